"""Probes of `steer eval`: each file asks one question about a model, with its items, what it says and what chance is."""
