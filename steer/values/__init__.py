"""Plain values that every other folder shares."""
