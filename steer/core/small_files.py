"""Reads small files that users exchange, within limits on size and nesting, and reads and writes strict YAML.

Profiles, traits, recipes and `sliders.yaml` are read with it.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from steer.errors import SteerError
from steer.files import one_line

_YAML_LIMIT = 1_000_000
"""Largest YAML file, in bytes."""
_DEPTH_LIMIT = 32
_SURROGATE = re.compile("[\ud800-\udfff]")
_NODE_LIMIT = 50_000  # PyYAML parses some 30,000 values a second


def read_small(path: Path, limit: int, what: str) -> bytes:
    """The bytes of a file. Errors: SteerError if it is missing, unreadable, or larger than `limit` bytes."""
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


def read_given(source: str | Path | bytes, limit: int, what: str, name: str) -> tuple[bytes, str]:
    """(the bytes of a file, or those given; what errors call them, `name` for those given). Errors: as `read_small`."""
    if not isinstance(source, bytes):
        return read_small(Path(source), limit, what), str(source)
    if len(source) > limit:
        raise SteerError(f"{name}: expected at most {limit:,} bytes, found {len(source):,}; is it the right file?")
    return source, name


def stamp(path: Path) -> tuple[int, ...]:
    """Modification time, size and inode of a file, which change when it is rewritten; empty if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def load_yaml(data: bytes, where: str, what: str, *, aliases: bool = False) -> Any:
    """Parse YAML into plain data: at most 50,000 values in 32 levels.

    Duplicate keys are refused, and so are anchors and aliases, because a few lines of them can expand to gigabytes.
    With `aliases` they are accepted, and each counts as all the values that it expands to. Errors: SteerError of one
    line.
    """
    try:
        return _Loader(data.decode("utf-8-sig"), aliases).get_single_data()
    # PyYAML raises ValueError for an invalid date, AttributeError for `!!timestamp x`, IndexError for `!!int ''`.
    except Exception as e:
        raise SteerError(f"{where}: expected {what} in YAML, found {one_line(e)}; mend the file") from e


def read_yaml(path: Path, what: str, *, aliases: bool = False) -> Any:
    """Parse a YAML file of at most a megabyte. Errors: SteerError, as in `read_small` and `load_yaml`."""
    return load_yaml(read_small(path, _YAML_LIMIT, what), str(path), what, aliases=aliases)


def dump_yaml(data: Any) -> bytes:
    """Plain data as YAML; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100).encode()


def shown(value: Any) -> str:
    """A value for an error message: one short line, whatever the value is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        return f"a {type(value).__name__} too long to show"


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, aliases: bool) -> None:
        super().__init__(text)
        self._aliases = aliases
        self._depth = self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """id of a finished node -> (its number of values, its number of levels), with aliases expanded."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        before, self._depth = self._nodes, self._depth + 1
        if isinstance(event, yaml.AliasEvent) and self._aliases:
            node: Any = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.YAMLError(f"an alias in line {line} to a value that contains it")
            self._count(*self._sizes[id(node)], line)
        else:
            if getattr(event, "anchor", None) is not None and not self._aliases:  # of an alias too
                raise yaml.YAMLError(f"an anchor or alias (&, *) in line {line}, not in quotes")
            self._count(1, 1, line)  # before the node is parsed, because PyYAML recurses once per level
            node = super().compose_node(parent, index)
            children: Any = node.value
            if isinstance(node, yaml.ScalarNode):
                children = ()
                if _SURROGATE.search(node.value):
                    raise yaml.YAMLError(f"half a surrogate pair (\\ud800 to \\udfff) in a text in line {line}")
            flat = [n for c in children for n in (c if isinstance(c, tuple) else (c,))]
            levels = 1 + max((self._sizes[id(n)][1] for n in flat), default=0)
            self._sizes[id(node)] = self._nodes - before, levels
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {shown(key.value)} a second time in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return node

    def _count(self, values: int, levels: int, line: int) -> None:
        self._nodes += values
        if self._nodes > _NODE_LIMIT:
            raise yaml.YAMLError(f"more than {_NODE_LIMIT:,} values")
        if self._depth + levels - 1 > _DEPTH_LIMIT:
            raise yaml.YAMLError(f"more than {_DEPTH_LIMIT} levels in line {line}")


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
