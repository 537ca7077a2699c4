"""Hooks that apply edits to the running model: their arithmetic, their registration, and receipts of what they did."""
