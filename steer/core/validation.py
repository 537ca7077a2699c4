"""Frozen dataclasses whose fields pydantic checks, also where they are parts of a stranger's file.

An error is one line: the path of the key, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from functools import wraps
from numbers import Integral
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails, PydanticUseDefault

from steer.core.small_files import shown
from steer.errors import SteerError, UsageError
from steer.plain_text import without_surrogates

_T = TypeVar("_T")

_MESSAGES = {
    "missing": ("a value", "add it"),
    "string_type": ("text", "put it in quotes"),
    "string_unicode": ("whole characters", "take the broken one out"),
    "string_too_short": ("text", "fill it in"),
    "string_too_long": ("at most {max_length} characters", ""),
    "int_type": ("a whole number", ""),
    "float_type": ("a finite number", "write one such as -0.5 or 1.0e-3"),
    "finite_number": ("a finite number", "write one such as -0.5 or 1.0e-3"),
    "bool_type": ("true or false", ""),
    "list_type": ("a list", "write one such as [a, b]"),
    "tuple_type": ("a list", "write one such as [a, b]"),
    "too_short": ("at least {min_length} of them", "add some"),
    "too_long": ("at most {max_length} of them", "delete some"),
    "dict_type": ("a mapping", ""),
    "model_type": ("a mapping", ""),
    "unexpected_keyword_argument": ("no argument of that name", ""),
    "literal_error": ("one of {expected}", ""),
    "greater_than": ("a number above {gt:g}", ""),
    "greater_than_equal": ("a number of at least {ge:g}", ""),
    "less_than": ("a number below {lt:g}", ""),
    "less_than_equal": ("a number of at most {le:g}", ""),
}
"""Type of a pydantic error -> what was expected, and what to do. Other types keep pydantic's own words."""


def error_line(e: ValidationError, positional: Sequence[str] = ()) -> str:
    """The first of `error_lines`."""
    return error_lines(e, positional)[0]


def error_lines(e: ValidationError, positional: Sequence[str] = ()) -> list[str]:
    """The mistakes that pydantic found, each as `key: inner[0]: expected ..., found ...; what to do`.

    A validator that raises ValueError gives the words after the path itself. `positional` names the arguments of a call
    that were given without names.
    """
    return [_error_line(mistake, positional) for mistake in e.errors(include_url=False)]


def _error_line(mistake: ErrorDetails, positional: Sequence[str]) -> str:
    keys, context = list(mistake["loc"]), mistake.get("ctx", {})
    if positional and keys and isinstance(keys[0], int):
        keys[0] = positional[keys[0]]
    path = "".join(f"[{key}]" if isinstance(key, int) else f": {key}" for key in keys).removeprefix(": ")
    if mistake["type"] == "value_error":
        text = str(context["error"])
    else:
        found = "none" if mistake["type"] == "missing" else shown(mistake["input"])
        expected, do = _MESSAGES.get(mistake["type"], (mistake["msg"].removeprefix("Input should be "), ""))
        if mistake["type"] in _MESSAGES:
            choices = context.get("expected", "").replace("'", "").replace(" or ", ", ")
            expected = expected.format(**context | {"expected": choices})
        text = f"expected {expected}, found {found}" + (do and f"; {do}")
    return (f"{path}: {text}" if path else text)[:500]


def mistakes_in(kind: type[_T], data: Any) -> tuple[_T | None, list[str]]:
    """The value of a checked class that `from_file` would build of parsed YAML or JSON, or None, and every mistake in
    the data, one line each."""
    keys, lines = _keys(kind), []
    for key in data if isinstance(data, Mapping) else ():
        try:
            known_keys({key: None}, keys)
        except ValueError as e:
            lines.append(str(e))
    known = {k: v for k, v in data.items() if k in keys} if isinstance(data, Mapping) else data
    try:
        value = TypeAdapter(kind).validate_python(known)
    except ValidationError as e:
        return None, lines + error_lines(e)
    return value, lines


def from_file(kind: type[_T], data: Any, where: str) -> _T:
    """A value of a checked class or a pydantic model, built from parsed YAML or JSON.

    Errors: SteerError of one line that begins with `where`.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as e:
        raise SteerError(f"{where}: {error_line(e)}") from e


class Lenient(BaseModel):
    """A mapping in a stranger's file of which everything usable is used; build it with `from_stranger`.

    A null and an unknown key are ignored. A value of the wrong kind counts as absent, and is remarked on.
    """

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_absent(cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            if value is not None:
                return read(value)
        except ValidationError as e:
            if value:  # "", [] and {} are nothing, whatever the kind
                where, remarks = info.context  # pyright: ignore[reportGeneralTypeIssues]
                place = f"{where}: {info.field_name}"
                remarks.setdefault(place, f"{place}: {error_line(e)}; it counts as empty")
        raise PydanticUseDefault


_Lenient = TypeVar("_Lenient", bound=Lenient)


def from_stranger(kind: type[_Lenient], data: Mapping[str, Any], where: str, remarks: dict[str, str]) -> _Lenient:
    """A lenient value. `remarks` gets a line for each field with a value of the wrong kind, by the field's place; one
    line, although several mappings of one kind at the same `where` may have such a field."""
    return kind.model_validate(data, context=(where, remarks))


def known_keys(data: Any, keys: Iterable[str], path: str = "") -> dict[str, Any]:
    """The entries of a mapping, without those that are null.

    Errors: ValueError that begins with `path`, for anything but a mapping, and for a key that is not among `keys`.
    """
    keys = list(keys)
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}expected a mapping with {', '.join(keys)}, found {shown(data)}")
    for key in data:
        if key not in keys:
            similar = difflib.get_close_matches(key[:60], keys, 1) if isinstance(key, str) else []
            do = f"did you mean {similar[0]!r}?" if similar else "take it out"
            raise ValueError(f"{path}expected keys among {', '.join(keys)}, found {shown(key)}; {do}")
    return {k: v for k, v in data.items() if v is not None}


def _keys(kind: Any) -> list[str]:
    """The keys that a mapping for a checked class may have."""
    return [info.alias or name for name, info in kind.__pydantic_fields__.items()]


@dataclass_transform(frozen_default=True, field_specifiers=(Field, field))
def checked(cls: type[_T]) -> type[_T]:
    """Decorator: a frozen dataclass whose fields have the types and bounds of their annotations.

    A wrong argument raises UsageError. The class may also be built from a mapping, with `from_file` or as a field of
    another checked class: an unknown key is refused, and a null counts as absent.
    """

    def from_mapping(kind: Any, data: Any) -> Any:
        """Refuse unknown keys of a mapping, before pydantic reads its values."""
        if isinstance(data, ArgsKwargs | kind):
            return data
        return known_keys(data, _keys(kind))

    if "from_mapping" not in vars(cls):
        cls.from_mapping = model_validator(mode="before")(classmethod(from_mapping))  # pyright: ignore
    config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_by_name=True, validate_by_alias=True)
    made = dataclass(frozen=True, config=config)(cls)
    build, names = made.__init__, [f.name for f in fields(made)]  # pyright: ignore[reportArgumentType]

    @wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except ValidationError as e:
            raise UsageError(error_line(e, names)) from e

    made.__init__ = init
    return made  # pyright: ignore[reportReturnType]


def _plain_text(text: str, allowed: str = "") -> str:
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed:
            raise ValueError(f"expected plain text, found the character {c!a}; take it out")
    return text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("expected text, found none; fill it in")
    return text


Bool = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number; not text, true or false."""
Share = Annotated[Number, Field(ge=0, le=1)]
Whole = Annotated[
    int,
    Field(strict=True, ge=-(2**63), lt=2**63),
    BeforeValidator(lambda v: int(v) if isinstance(v, Integral) and not isinstance(v, bool) else v),  # numpy's numbers
]
"""A whole number of 64 bits."""
Count = Annotated[Whole, Field(ge=0)]
Text = Annotated[str, Field(strict=True), AfterValidator(_filled)]
"""Text that is not blank."""
Line = Annotated[Text, AfterValidator(_plain_text)]
"""Text without characters that a terminal or a file could not hold."""
Lines = Annotated[str, Field(strict=True), AfterValidator(lambda text: _plain_text(text, "\n\t"))]
"""The same; newlines and tabs are allowed, and so is no text at all."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _clean(text: str) -> str:
    return text if text.isascii() and text.isprintable() else without_surrogates(_CONTROL.sub("", text))


def _texts(items: list[Any], info: ValidationInfo) -> list[str]:
    for item in items:
        if item and not isinstance(item, str):
            where, remarks = info.context  # pyright: ignore[reportGeneralTypeIssues]
            place = f"{where}: {info.field_name}"
            remarks.setdefault(place, f"{place}: expected text, found {shown(item)}; it counts as empty")
    return [_clean(item) for item in items if isinstance(item, str)]


Clean = Annotated[str, Field(strict=True), AfterValidator(_clean)]
"""Text without the characters that would move a terminal's cursor, or worse, which are taken out."""
Cleans = Annotated[list[Any], Field(strict=True), AfterValidator(_texts)]
"""A list of such texts in a `Lenient` mapping; what is no text is left out of it."""
