"""Directions (and later dictionaries) found in the residual stream."""
