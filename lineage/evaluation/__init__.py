"""Scores of trained systems, each with its interval and protocol.

Modules, in the order of a score: `prompts` (what is asked for), `scenes` (real pictures of it, and
near misses), `judge` (reads what a picture shows) and `exam` (measures the judge), `features` and
`scorer` (networks), `metrics`, `intervals`, `sections` (from pictures to numbers), `real` (real
pictures as the ceiling), `cost`, `run` (all of it), `table`.
"""
