"""A checkpoint in memory: loading it, forward passes, decoding, and sliders that move while it runs.

`steered.py` has the class that users see; `steering/` has the hooks.
"""
