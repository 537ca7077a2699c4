"""Probes of `steer eval`: each file asks one question, with its items, what a figure says and what chance is."""
