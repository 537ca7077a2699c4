"""The family tree's page: everything on it, whole in one file, safe whatever the names, from no vote to 60 merges."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from steer.lineage.lineage import Gate, Generation, Lineage, Move, Node, Settings
from steer.lineage.ratings import standing
from steer.lineage.tree_report import label, layout, write_tree

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028 \u202e ]]> <!--"
BASE = {"merge_method": "model_stock", "base_model": "/models/base", "models": [{"model": "/models/calm"}]}


def lineage(place: Path, generations: int = 1, children: int = 3, text: str = "adds most that is new") -> Lineage:
    """A lineage in which each generation's first child is the parent of the next and its last one is gated out."""
    made = Lineage.create(place, Settings([]))
    start = Node("0", Move("start"), "the recipe given", BASE, gate=Gate(True, {"capability": 3.0}))
    made.write(Generation(0, [start]))
    parent = "0"
    for number in range(1, generations):
        nodes = []
        for letter in "abcdefghijk"[:children]:
            out = letter == "c"
            gate = Gate(not out, {"capability": 3 + number / 10}, [f"perplexity 3.0 -> 900 {text}"] if out else [])
            model = f"/models/prose-{number}{letter} {text}"
            recipe = {**BASE, "models": [*BASE["models"], {"model": model}]}
            nodes.append(Node(f"{number}{letter}", Move("add", model), text, recipe, parent, gate=gate))
        made.write(Generation(number, nodes))
        parent = nodes[0].id
    return made


class Elements(HTMLParser):
    """What a browser would make of a page: its elements, and all text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data

    def classes(self, of: str) -> dict[str, str]:
        """The classes of each element of a name, by its id."""
        return {a.get("id") or "": a.get("class") or "" for t, a in self.tags if t == of}


def written(lineage: Lineage) -> Elements:
    return Elements(write_tree(lineage, standing(lineage), lineage.place / "tree.html").read_text("utf-8"))


def vote(lineage: Lineage, better: str, worse: str, text: str = "Hello?") -> None:
    lineage.vote(better, worse, "a", chat=[("user", text)], replies=[text, text], left="b", voter="kim")


def test_every_merge_has_a_box_in_both_pictures_and_a_card_with_what_it_changed(tmp_path: Path) -> None:
    made = lineage(tmp_path / "noir", 3)
    vote(made, "2a", "2b")
    page = written(made)
    cards = page.classes("article")
    assert list(cards) == [f"node-{n}" for n in ("0", "1a", "1b", "1c", "2a", "2b", "2c")]
    links = [a["href"] for t, a in page.tags if t == "a"]
    assert {links.count(f"#{card}") for card in cards if card != "node-2a"} == {2}
    assert sum(t == "path" for t, _ in page.tags) == 2 * 6
    for said in ("after 1 vote 2a leads", "+ prose-2b", "add prose-2b", "children of 1a", "perplexity 3.0 -> 900"):
        assert said in page.text
    assert "out" in cards["node-1c"].split()
    assert "- model: /models/prose-2a" in page.text
    assert "- model: /models/prose-1b" not in page.text


def test_the_path_to_the_winner_is_marked_once_there_are_votes(tmp_path: Path) -> None:
    made = lineage(tmp_path / "noir", 3)
    assert not any("best" in (a.get("class") or "").split() for _, a in written(made).tags)
    vote(made, "2b", "1b")
    page = written(made)
    best = [card for card, names in page.classes("article").items() if "best" in names.split()]
    assert best == ["node-0", "node-1a", "node-2b"]
    assert [card for card, names in page.classes("article").items() if "winner" in names.split()] == ["node-2b"]
    assert sum("best" in (a.get("class") or "").split() for t, a in page.tags if t == "path") == 2 * 2
    assert [a["data-node"] for t, a in page.tags if t == "details"] == ["1b", "2b"]
    assert "1 vote of 1 person" in " ".join(page.text.split())


@pytest.mark.parametrize("generations", [1, 20])
def test_one_merge_and_sixty_without_votes_are_pages(tmp_path: Path, generations: int) -> None:
    page = written(lineage(tmp_path / "noir", generations, 3))
    assert len(page.classes("article")) == 1 + (generations - 1) * 3
    assert ("select" in {t for t, _ in page.tags}) == (generations > 1)


def test_text_of_strangers_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    made = lineage(tmp_path / "noir", 2, text=" ".join(HOSTILE.split()))
    vote(made, "1a", "0", HOSTILE)
    raw = write_tree(made, standing(made), tmp_path / "tree.html").read_text("utf-8")
    page = Elements(raw)
    assert sum(t == "script" for t, _ in page.tags) == 2
    assert "img" not in {t for t, _ in page.tags}
    assert page.text.count("<img src=x onerror=alert(1)>") > 5
    assert "\u202e" not in raw
    assert not [t for t, a in page.tags if "src" in a or t == "link" or re.match(r"\w+:", a.get("href") or "")]
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("width", [1000, 340])
@pytest.mark.parametrize("children", [1, 3, 11])
def test_boxes_lie_inside_and_not_on_each_other_and_generations_below_each_other(
    tmp_path: Path, width: int, children: int
) -> None:
    generations = lineage(tmp_path / "noir", 4, children).generations
    places, box = layout(generations, width)
    assert box >= 80
    assert [p.node for p in places] == [n.id for g in generations for n in g.nodes]
    assert all(p.x >= 0 and p.x + box <= width for p in places)
    for i, one in enumerate(places):
        for other in places[i + 1 :]:
            assert other.x - one.x >= box or other.y - one.y >= 58 or one.x - other.x >= box
    lowest = [max(p.y for p in places if p.node in {n.id for n in g.nodes}) for g in generations]
    highest = [min(p.y for p in places if p.node in {n.id for n in g.nodes}) for g in generations]
    assert all(low + 58 < high for low, high in zip(lowest, highest[1:], strict=False))


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (Move("start"), "start"),
        (Move("add", "/models/base+/tunes/prose/"), "+ prose"),
        (Move("remove", "someone/roleplay"), "− roleplay"),
        (Move("base", "/models/other"), "base other"),
        (Move("weight", "/tunes/prose", 0.5), "weight of prose: 0.5"),
        (Move("method", value="ties"), "ties"),
        (Move("profile", profile={"name": "noir", "sliders": []}), "sliders noir"),
        (Move("profile"), "sliders away"),
    ],
)  # fmt: skip
def test_a_move_in_a_few_words(move: Move, expected: str) -> None:
    assert label(move) == expected
