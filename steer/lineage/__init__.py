"""Lineages: generations of merges, chosen by taste."""
