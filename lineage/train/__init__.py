"""The training loop, stages, the run folder's files and the log.

Called, it is `lineage.runs.train`.
"""

from lineage.callable_package import make_callable

make_callable(__name__, "lineage.runs:train")
