"""Scores that can be trusted: judge, metrics, cost.

Called, it is `lineage.evaluate.run.evaluate`. Modules, in the order of a score: `prompts` (what is
asked for), `scenes` (real pictures of it, and near misses), `judge` (what a picture shows) and
`exam` (how well it judges), `features` and `scorer` (networks), `metrics`, `intervals`, `sections`
(from pictures to numbers), `real` (the frame), `cost`, `run` (all of it), `table`.
"""

from lineage.callable_package import make_callable

make_callable(__name__, "lineage.evaluate.run:evaluate")
