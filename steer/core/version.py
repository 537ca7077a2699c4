"""The version of this program, below everything that records it; `steer.__version__` is the same."""

__version__ = "0.1.0"
