"""Equal-budget comparison of systems and its report.

Called, it is `lineage.compare.run.compare`.
"""

from lineage.callable_package import make_callable

make_callable(__name__, "lineage.compare.run:compare")
