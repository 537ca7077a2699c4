"""`steer bake --search`: the space of edits, trials on the live model, the study on disk, and the choice of one."""
