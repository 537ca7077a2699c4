"""Plain values that the rest of the package works with: directions, features, sliders, profiles and traits.

Nothing here needs a model or a checkpoint.
"""
