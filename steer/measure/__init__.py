"""Measurements: text scorers, KL divergence, perplexity, dose responses, calibration, and the search for bakes."""
