"""A lineage as text: its tree, and the model card of an exported node."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.tree import Tree

from steer.lineage.lineage import Lineage, Node, ancestors
from steer.lineage.ratings import Rating
from steer.lineage.recipes import describe, models_of, short_name


def tree_text(lineage: Lineage, ratings: Mapping[str, Rating]) -> str:
    """Return the tree of all nodes, a line each: what it changes in its parent, and how it was rated."""
    nodes, lines = lineage.nodes, dict[str, Tree]()
    for node in nodes.values():
        label = _line(node, ratings.get(node.id))
        lines[node.id] = lines[node.parent].add(label) if node.parent else Tree(label, highlight=False)
    out = io.StringIO()
    root = next(iter(lines.values()), Tree("nothing yet"))
    Console(file=out, width=200, markup=False, emoji=False, highlight=False).print(root)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def model_card(lineage: Lineage, node: Node, ratings: Mapping[str, Rating], recipe: Mapping[str, Any]) -> str:
    """Return the README.md of a node that is exported by `recipe`: its models, how it came about, and the tree."""
    way = reversed(ancestors(node, lineage.nodes))
    steps = [f"{i}. {n.id}: {describe(n.move)} ({n.why})" for i, n in enumerate(way)]
    rating, votes = ratings.get(node.id), len(lineage.votes)
    rated = f", rated {_interval(rating)}" if rating is not None and rating.votes else ""
    named = _hub_names(recipe)
    front = {**({"base_model": named} if named else {}), "tags": ["mergekit", "merge"]}
    profile = "" if node.profile is None else (
        f"\nThe sliders of the profile {node.profile.get('name')} are part of it: profile.yaml.\n"
    )  # fmt: skip
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Merge {node.id} of {len(lineage.generations)} generations

A merge by {recipe["merge_method"]} of {", ".join(map(short_name, models_of(node.recipe)))}, chosen with `steer evolve`:
in each generation people compared replies of merges without knowing whose they were, and the best was changed further.
{votes} vote{"" if votes == 1 else "s"} on {len(lineage.nodes)} merges{rated}.
{profile}
## How it came about

{chr(10).join(steps)}

## The lineage

Ratings are log-odds of being preferred to the average merge, with 95 % intervals (Bradley-Terry).

```
{tree_text(lineage, ratings)}
```

## Recipe

`mergekit-yaml recipe.yml OUT`, or `steer merge recipe.yml OUT`. Relative paths are as in the recipe that the lineage
began with.

```yaml
{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()}
```
"""


def _line(node: Node, rating: Rating | None) -> str:
    text = f"{node.id} {describe(node.move)}"
    if not node.passed:
        return f"{text} (did not pass)"
    return text if rating is None or not rating.votes else f"{text}  {_interval(rating)}, {rating.votes} votes"


def _interval(rating: Rating) -> str:
    return f"{rating.value:+.2f} [{rating.low:+.2f}, {rating.high:+.2f}]"


def _hub_names(recipe: Mapping[str, Any]) -> list[str]:
    """The recipe's models that are names of the hub, which a card may link."""
    names = [recipe.get("base_model"), *models_of(dict(recipe))]
    parts = [part for name in names if name for part in name.split("+")]
    return [
        p for p in dict.fromkeys(parts) if p.count("/") == 1 and not p.startswith((".", "/")) and not Path(p).is_dir()
    ]
