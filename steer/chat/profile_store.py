"""Profiles that the page saves under $STEER_HOME/profiles, offers for download, and accepts as uploads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from steer.checkpoint.fetch import home
from steer.core.profile import SIZE_LIMIT, Profile
from steer.core.small_files import dump_yaml, load_yaml, read_given
from steer.errors import UsageError
from steer.files import delete

_UNFIT = re.compile(r"[^\w.-]+")


def profiles_folder() -> Path:
    """Return the directory of saved profiles."""
    return home() / "profiles"


def saved_profiles() -> dict[str, Path]:
    """Return name -> file of all saved profiles, sorted by file name."""
    return {file.stem: file for file in sorted(profiles_folder().glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """Load a saved profile. Errors: UsageError for an unknown name; SteerError for a file that is not a profile."""
    profiles = saved_profiles()
    if name not in profiles:
        raise UsageError(f"profile {name!r}: expected one of {', '.join(profiles) or 'none so far'}; save it first")
    return Profile.load(profiles[name])


def keep_profile(profile: Profile) -> Path:
    """Save a profile under its name, replacing another of that name; return the file. Errors: SteerError."""
    return profile.save(profiles_folder() / f"{file_name(profile.name)}.yaml")


def forget_profile(name: str) -> None:
    """Delete a saved profile, if it exists. Errors: SteerError if the file cannot be deleted."""
    if (file := saved_profiles().get(name)) is not None:
        delete(file)


def profile_bytes(profile: Profile) -> bytes:
    """Return a profile as YAML for download. Errors: UsageError if it names files, which a download would lack."""
    _check_files(profile, f"profile {profile.name!r}")
    return dump_yaml(profile.dump())


def uploaded_profile(data: bytes, name: str) -> Profile:
    """Parse an uploaded profile.

    Errors: SteerError for data that is not a profile or is too large, and for a profile that names files: an upload
    must not decide which files are read on this machine.
    """
    data, _ = read_given(data, SIZE_LIMIT, "a profile", name)
    profile = Profile.parse(load_yaml(data, name, "a profile"), name)
    _check_files(profile, name)
    return replace(profile, folder=None)


def file_name(name: str) -> str:
    """Return a profile's name as a file name: letters, digits, `_`, `.` and `-`, at most 80 characters."""
    return _UNFIT.sub("-", name.strip()).strip("-.")[:80] or "profile"


def _check_files(profile: Profile, where: str) -> None:
    if files := profile.files():
        raise UsageError(f"{where}: expected sliders by name, found the file {files[0]!r}; name the direction instead")
