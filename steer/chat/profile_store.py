"""Profiles that a page keeps, gives away and is given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from steer.errors import SteerError, UsageError
from steer.values.profile import SIZE_LIMIT, Profile
from steer.values.small_files import dump_yaml, load_yaml
from steer.weights.fetch import home

_UNFIT = re.compile(r"[^\w.-]+")


def profiles_folder() -> Path:
    """Where they are kept."""
    return home() / "profiles"


def saved_profiles() -> dict[str, Path]:
    """The files of those that are kept, by name, in order."""
    return {file.stem: file for file in sorted(profiles_folder().glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """One that is kept. Errors: UsageError naming those there are; SteerError for a file that is none."""
    there = saved_profiles()
    if name not in there:
        raise UsageError(f"profile {name!r}: expected one of {', '.join(there) or 'none so far'}; save it first")
    return Profile.load(there[name])


def keep_profile(profile: Profile) -> Path:
    """Keep one under its name, in place of another of that name. Errors: SteerError."""
    return profile.save(profiles_folder() / f"{file_name(profile.name)}.yaml")


def forget_profile(name: str) -> None:
    """Delete one. Errors: SteerError where that cannot be done."""
    file = saved_profiles().get(name)
    if file is None:
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as e:
        raise SteerError(f"{file}: could not be deleted ({e.strerror}); check its permissions") from e


def profile_bytes(profile: Profile) -> bytes:
    """One as a file to give away. Errors: UsageError for one that names files, which would not go with it."""
    _check_files(profile, f"profile {profile.name!r}")
    return dump_yaml(profile.dump())


def uploaded_profile(data: bytes, name: str) -> Profile:
    """One from a file that somebody sent. Errors: SteerError for what is no profile, is too large, or names files: a
    stranger has no say in what is read on this machine."""
    if len(data) > SIZE_LIMIT:
        raise SteerError(f"{name}: expected a profile of at most {SIZE_LIMIT:,} bytes, found {len(data):,}")
    profile = Profile.parse(load_yaml(data, name, "a profile"), name)
    _check_files(profile, name)
    return replace(profile, folder=None)


def file_name(name: str) -> str:
    """A profile's name as a file's, without what file systems do not like."""
    return _UNFIT.sub("-", name.strip()).strip("-.")[:80] or "profile"


def _check_files(profile: Profile, where: str) -> None:
    if files := profile.files():
        raise UsageError(f"{where}: expected sliders by name, found the file {files[0]!r}; name the direction instead")
