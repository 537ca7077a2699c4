"""What is true of a model: scores, divergences, reports, plots."""
