"""Errors that a user can cause, each with a message of one line.

A message names the file (or option), what was expected, what was found, and what to do.
The command line prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import warnings
from pathlib import Path


class SteerError(Exception):
    """Base of all errors that the user can mend. Exit code 1.

    Example:
        try:
            model = steer.load("no/such/directory")
        except steer.SteerError as error:
            print(error)
    """

    exit_code = 1


class UsageError(SteerError):
    """The command or a call was wrong: an unknown name, or text where a number was expected. Exit code 2."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """A mapping of sliders was asked for a name that no slider has."""

    __str__ = Exception.__str__  # KeyError's __str__ is the repr of its message


class CheckpointError(SteerError):
    """Files on disk are missing, broken, or differ from what their own config, index or certificate says."""


class MismatchError(SteerError):
    """Two things that must belong together do not: their widths, checkpoints or sites differ."""


class OutputExistsError(SteerError):
    """The output directory exists and is not empty."""


class TraitNotFoundError(SteerError):
    """A model's replies do not show a trait: they are empty, or much the same under both instructions."""


class UnsupportedError(SteerError):
    """The tool refuses instead of guessing: an unknown architecture, or a tensor that it cannot edit."""


class UnreachableError(SteerError):
    """A server does not answer, or stops in the middle of an answer. The same request may succeed later."""


class StoppedError(SteerError):
    """A signal stopped the work; finished parts are on the disk. The exit code is 128 + signal, as in shells."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SkippedWarning(UserWarning):
    """One file among many could not be read and was skipped; the message names it."""


_skipped: set[str] = set()


def skip(file: Path, error: Exception) -> None:
    """Warn that one file among many is skipped because of `error`; each message is given once per process."""
    found = " ".join(str(error).split()) or type(error).__name__
    text = found if isinstance(error, SteerError) and str(file) in found else f"{file}: {found[:300]}"
    if text not in _skipped:
        _skipped.add(text)
        warnings.warn(f"{text}; it is passed over", SkippedWarning, stacklevel=2)
