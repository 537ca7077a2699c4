"""Small files that users swap: read with limits, as strict YAML."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from steer.errors import SteerError
from steer.files import one_line

_DEPTH_LIMIT = 32
_NODE_LIMIT = 50_000  # PyYAML makes some 30,000 values a second


def read_small(path: Path, limit: int, what: str) -> bytes:
    """A file's bytes. Errors: SteerError for one that is missing, not to be read, or larger than `limit` bytes."""
    try:
        if not path.is_file():
            found = "a directory" if path.is_dir() else "none"
            raise SteerError(f"{path}: expected {what}, found {found}; check the path")
        with open(path, "rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise SteerError(f"{path}: expected {what}, could not read it ({e.strerror}); check its permissions") from e
    if len(data) > limit:
        raise SteerError(f"{path}: expected {what} of at most {limit:,} bytes, found more; is it the right file?")
    return data


def load_yaml(data: bytes, where: str, what: str) -> Any:
    """Plain data. Keys that come twice are refused, and so are anchors and aliases: a few lines of them can stand
    for gigabytes. Errors: SteerError."""
    try:
        return yaml.load(data.decode("utf-8-sig"), _Loader)
    # Dates, numbers and escapes that are out of range raise ValueError and OverflowError in PyYAML.
    except (yaml.YAMLError, ValueError, OverflowError) as e:
        raise SteerError(f"{where}: expected {what} in YAML, found {one_line(e)}; mend the file") from e


def dump_yaml(data: Any) -> bytes:
    """Plain data as YAML, in the order it has."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100).encode()


def shown(value: Any) -> str:
    """A value that was found, as an error shows it: one short line, whatever it holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return f"a {type(value).__name__} too long to show"


class _Loader(yaml.SafeLoader):
    _depth = _nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"an anchor or alias (&, *) in line {event.start_mark.line + 1}, not in quotes")
        self._nodes += 1
        if self._nodes > _NODE_LIMIT:
            raise yaml.YAMLError(f"more than {_NODE_LIMIT:,} values")
        self._depth += 1
        # PyYAML calls itself for every level.
        if self._depth > _DEPTH_LIMIT:
            raise yaml.YAMLError(f"more than {_DEPTH_LIMIT} levels in line {event.start_mark.line + 1}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {shown(key.value)} a second time in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flat = not any(isinstance(i, list | dict) for i in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2
