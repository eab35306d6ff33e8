"""Equal-budget comparison of systems and its report."""
