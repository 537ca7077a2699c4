"""Bakes: edits written into the weights of a new checkpoint, an adapter or a control vector, with a certificate.

`bake` writes any form; `plan` decides what a form can hold, and `checkpoint`, `adapter` and `control_vector` write it.
`verify` checks the output, with `checks`. `steer.verbs.bake` is the public entry.
"""
