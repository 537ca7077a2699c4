"""Commands that combine several folders of the package: bake by name, bake by search, demo, feature lists.

`steer.cli` calls them. They may import the folders of lower layers (tests/test_layers.py).
"""
