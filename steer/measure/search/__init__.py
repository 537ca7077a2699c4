"""The search over what to bake: the space of edits, trials on the live model, the study on disk, the choice."""
