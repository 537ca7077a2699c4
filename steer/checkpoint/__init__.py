"""Checkpoints on disk: their anatomy, tensors and sketch, where they come from, and the library of their sliders.

Built on `steer.core`; the bakes and the live model are built on this folder.
"""
