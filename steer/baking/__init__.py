"""Bakes: edits written into the weights of a new checkpoint, an adapter or a control vector, with a certificate.

Each form has a module that writes it and one that checks it: `bake` and `checkpoint_check`, `adapter` and
`adapter_check`, `control_vector` and `control_vector_check`. `verify` runs the checks. `steer.verbs.bake` is the public
entry.
"""
