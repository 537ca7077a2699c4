"""The errors a user can cause, each one line long.

A message names the file (or option), what was expected, what was found, and what to do.
The command line prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import warnings
from pathlib import Path


class SteerError(Exception):
    """Something went wrong that the user can mend. Exit code 1."""

    exit_code = 1


class UsageError(SteerError):
    """The command itself was wrong: an unknown name, a number that is none. Exit code 2."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """A mapping of sliders was asked for a name that nothing has."""

    __str__ = Exception.__str__  # KeyError's is the repr of its message


class CheckpointError(SteerError):
    """A checkpoint on disk is missing, broken, or not what it says."""


class MismatchError(SteerError):
    """Two things that must belong together do not (width, checkpoint, site)."""


class OutputExistsError(SteerError):
    """The output directory exists and is not empty."""


class UnsupportedError(SteerError):
    """The tool refuses rather than guesses: an unknown architecture, a tensor it cannot edit."""


class StoppedError(SteerError):
    """Asked to stop by a signal; what was done is on disk. The exit code is the shells' 128 + signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SkippedWarning(UserWarning):
    """A file among many cannot be read and was passed over; the message names it."""


_skipped: set[str] = set()


def skip(file: Path, error: Exception) -> None:
    """Warn, once in the life of the process, that one file among many is passed over because of `error`."""
    found = " ".join(str(error).split()) or type(error).__name__
    text = found if isinstance(error, SteerError) and str(file) in found else f"{file}: {found[:300]}"
    if text not in _skipped:
        _skipped.add(text)
        warnings.warn(f"{text}; it is passed over", SkippedWarning, stacklevel=2)
