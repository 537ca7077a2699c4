"""The parts of the page, a function `draw` each."""
