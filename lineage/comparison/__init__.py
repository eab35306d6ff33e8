"""Comparing systems: the equal-budget comparison with its report, and the page of `lineage app`."""
