"""Scores of trained systems, each with its interval and protocol.

Modules, in the order of a score: `prompts` (captions and their scenes), `scenes` (real pictures and
near misses of them), `judge` (detects objects) and `exam` (measures the judge), `features` and
`scorer` (networks), `metrics`, `intervals`, `sections` (from pictures to scores), `real` (real
pictures as the ceiling), `cost`, `run` (all of it), `table`.
"""
