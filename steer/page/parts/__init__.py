"""The parts of the page: one file per part, each with a function `draw`."""
