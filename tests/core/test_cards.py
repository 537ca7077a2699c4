"""Character cards: PNG and JSON of three versions read alike, and a hostile one is refused in one line."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from steer.core.cards import DEFAULT_PROMPT, FILE_LIMIT, JSON_LIMIT, Card, load_card, save_card_profile
from steer.core.profile import GateSpec, Profile, ProfileSlider, ScheduleSpec
from steer.core.sampler import PRESETS
from steer.core.small_files import shown
from steer.errors import SteerError, UsageError
from steer.files import JSON_DEPTH

V1: dict[str, Any] = {
    "name": "Duke Orsino",
    "description": "{{char}} rules Illyria and sighs at <USER>.",
    "personality": "lovesick",
    "scenario": "A garden at dusk.",
    "first_mes": "If music be the food of love, {{User}}, play on.",
    "mes_example": "<START>\n{{user}}: Will you go hunt?\n<BOT>: What, Curio?\n"
    "<start>\nYou: The hart.\n{{ char }}: Why, so I do.",
}
V2: dict[str, Any] = {
    "spec": "chara_card_v2",
    "spec_version": "2.0",
    "data": V1
    | {
        "creator_notes": "Best with {{char}} at low amounts.",
        "system_prompt": "Speak in verse. {{original}}",
        "post_history_instructions": "Keep {{char}} sighing.",
        "alternate_greetings": ["Enough, no more, {{user}}.", "O spirit of love!"],
        "tags": ["drama"],
        "creator": "W. S.",
        "character_version": "12",
        "character_book": {"entries": [{"keys": ["Olivia"], "content": "A countess.", "extensions": {"x": 1}}]},
        "extensions": {"depth_prompt": {"depth": 4, "prompt": "Sigh."}, "talkativeness": "0.5"},
    },
    "x_unknown": [1, 2.5, None, "Ø"],
}
V3: dict[str, Any] = V2 | {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "data": V2["data"] | {"nickname": "Orsino", "group_only_greetings": [], "assets": [], "creation_date": 1700000000},
}
PROFILE = Profile(
    "lovesick",
    notes="Sighs, line by line.\nNo sermons.",
    sampler=replace(PRESETS["wild"], top_k=50),
    preset="wild",
    sliders=(
        ProfileSlider("moralizing", -0.5, range=(-1.5, 1.0)),
        ProfileSlider("L14/123", 1.0, "clamp", ScheduleSpec("reply", first=40, gate=GateSpec("compliance", above=0.3))),
    ),
)


def encoded(card: object) -> str:
    return base64.b64encode(json.dumps(card).encode()).decode()


def png(how: str = "tEXt", **texts: str) -> bytes:
    """A real PNG with these texts; `how` is the kind of their chunks."""
    info = PngInfo()
    info.add_text("Software", "an easel")
    for keyword, text in texts.items():
        if how == "iTXt":
            info.add_itxt(keyword, text, lang="en", zip=len(text) > 1000)
        else:
            info.add_text(keyword, text, zip=how == "zTXt")
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "PNG", pnginfo=info)
    return out.getvalue()


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and body of every chunk of a PNG whose lengths and checksums are all right."""
    out, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert data[at + 8 + length : at + 12 + length] == struct.pack(">I", zlib.crc32(kind + body))
        out.append((kind, body))
        at += 12 + length
    return out


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk, before its pixels, and a right checksum."""
    data = png()
    at = 8 + 25
    return (
        data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + data[at:]
    )


def in_file(card: object, kind: str, tmp_path: Path) -> Path:
    """A card in a file of this kind."""
    path = tmp_path / f"duke.{kind}"
    path.write_bytes(png(chara=encoded(card)) if kind == "png" else json.dumps(card).encode())
    return path


def refused(source: Path | bytes, **how: str) -> str:
    """The one line with which a card is refused."""
    with pytest.raises(SteerError) as caught:
        load_card(source, **how)
    message = str(caught.value)
    assert message.startswith(f"{'card' if isinstance(source, bytes) else source}: ")
    assert message.isprintable()
    assert len(message) < 900
    return message


def test_a_v2_card_gives_prompt_greetings_and_notes() -> None:
    card = load_card(json.dumps(V2).encode(), user="Viola")
    assert (card.name, card.version) == ("Duke Orsino", "2.0")
    assert card.definition == (
        "Speak in verse. You are Duke Orsino. Write Duke Orsino's next reply to Viola, and stay in character.\n\n"
        "Duke Orsino rules Illyria and sighs at Viola.\n\n"
        "Duke Orsino's personality: lovesick\n\n"
        "Scenario: A garden at dusk."
    )
    assert card.examples == (
        "Viola: Will you go hunt?\nDuke Orsino: What, Curio?",
        "You: The hart.\nDuke Orsino: Why, so I do.",
    )
    assert card.system_prompt == "\n\n".join([card.definition, *(f"Example dialogue:\n{e}" for e in card.examples)])
    assert card.first_message == "If music be the food of love, Viola, play on."
    assert card.alternate_greetings == ("Enough, no more, Viola.", "O spirit of love!")
    assert card.post_history_instructions == "Keep Duke Orsino sighing."
    assert card.post_history_instructions not in card.system_prompt
    assert card.creator_notes == "Best with {{char}} at low amounts."
    assert card.extensions == V2["data"]["extensions"]
    assert card.profile is None


@pytest.mark.parametrize("how", ["tEXt", "zTXt", "iTXt"])
def test_every_kind_of_file_gives_the_same_card(tmp_path: Path, how: str) -> None:
    wanted = load_card(json.dumps(V2).encode())
    path = tmp_path / "duke.png"
    path.write_bytes(png(how, chara=encoded(V2)))
    assert load_card(path) == wanted
    assert load_card(str(path)) == wanted
    assert load_card(path.read_bytes()) == wanted
    assert load_card(png(how, Chara=encoded(V2))) == wanted
    assert load_card(b"\xef\xbb\xbf \n" + json.dumps(V2, ensure_ascii=False).encode()) == wanted


def test_a_v1_card_is_flat_and_lacks_a_system_prompt() -> None:
    card = load_card(json.dumps(V1).encode(), user="Viola", original="Be {{char}}.")
    assert card.version == "1.0"
    assert card.definition.startswith("Be Duke Orsino.\n\nDuke Orsino rules")
    assert (card.alternate_greetings, card.post_history_instructions, card.extensions) == ((), "", {})
    assert load_card(png(chara=encoded(V1))).definition.startswith("You are Duke Orsino.")


@pytest.mark.parametrize("none", ["", {}, 0, False, None])
def test_greetings_that_are_nothing_are_none(none: object) -> None:
    card = load_card(json.dumps(V2 | {"data": V2["data"] | {"alternate_greetings": none}}).encode())
    assert card.alternate_greetings == ()


def test_ccv3_comes_before_chara_and_brings_a_nickname() -> None:
    other = V2 | {"data": V2["data"] | {"name": "Backfill"}}
    for texts in ({"chara": encoded(other), "ccv3": encoded(V3)}, {"ccv3": encoded(V3), "chara": "rubbish"}):
        card = load_card(png(**texts))
        assert (card.name, card.version) == ("Duke Orsino", "3.0")
        assert card.post_history_instructions == "Keep Orsino sighing."
    assert load_card(png(chara=encoded(other))).name == "Backfill"


def test_of_two_cards_of_one_kind_the_first_is_read_and_written(tmp_path: Path) -> None:
    info = PngInfo()
    for name in ("First", "Second"):
        info.add_text("chara", encoded(V1 | {"name": name}))
    path = tmp_path / "two.png"
    Image.new("L", (4, 4)).save(path, "PNG", pnginfo=info)
    second = [c for c in chunks(path.read_bytes()) if c[0] == b"tEXt"][1]
    assert load_card(path).name == "First"
    card = load_card(save_card_profile(path, PROFILE, path))
    assert (card.name, card.profile) == ("First", PROFILE)
    assert [c for c in chunks(path.read_bytes()) if c[0] == b"tEXt"][1] == second


def test_a_newer_version_is_read_and_null_counts_as_empty() -> None:
    newer = {"spec": "chara_card_v4", "spec_version": "4.1", "data": V1 | {"personality": None, "mood": {"x": 1}}}
    card = load_card(json.dumps(newer).encode())
    assert card.version == "4.1"
    assert "personality" not in card.system_prompt
    assert load_card(json.dumps({"data": {"name": "Curio"}}).encode()).definition == DEFAULT_PROMPT.replace(
        "{{char}}", "Curio"
    ).replace("{{user}}", "You")


def test_macros_are_filled_in_one_pass_and_comments_go() -> None:
    data = V2["data"] | {
        "name": "{{user}}\n the \\1st",
        "description": "{{CHAR}}|<char>|<Bot>|{{ user }}|<user>|{{unheard of:a,b}}|"
        "{{// secret}}{{comment: x}}{{hidden_key:k}}|",
        "system_prompt": "{{original}}",
    }
    card = load_card(json.dumps({"data": data}).encode(), user="{{char}} \\g<0>", original="[{{user}}]")
    name, user = "{{user}} the \\1st", "{{char}} \\g<0>"
    assert card.name == name
    assert card.definition.startswith(f"[{user}]\n\n{name}|{name}|{name}|{user}|{user}|{{{{unheard of:a,b}}}}||\n\n")


def test_what_no_terminal_and_no_tokenizer_should_see_is_cleaned() -> None:
    data = V1 | {"first_mes": "Hi\x1b[2J\x00\r\n\tthere \ud83d!", "name": "D\x07uke"}
    card = load_card(json.dumps({"data": data}).encode())
    assert (card.name, card.first_message) == ("Duke", "Hi[2J\n\tthere \ufffd!")


@pytest.mark.parametrize("kind", ["png", "json"])
@pytest.mark.parametrize("card", [V1, V2, V3], ids=["V1", "V2", "V3"])
def test_a_profile_is_stored_and_all_else_stays(tmp_path: Path, kind: str, card: dict[str, Any]) -> None:
    path = in_file(card, kind, tmp_path)
    before = path.read_bytes()
    out = save_card_profile(path, PROFILE, tmp_path / f"out.{kind}")
    assert path.read_bytes() == before
    loaded = load_card(out)
    assert loaded.profile == PROFILE
    assert replace(loaded, profile=None, extensions={}, version="") == replace(
        load_card(path), extensions={}, version=""
    )
    text = dict(chunk.split(b"\0") for k, chunk in chunks(out.read_bytes()) if k == b"tEXt") if kind == "png" else {}
    made = json.loads(base64.b64decode(text[b"chara"]) if kind == "png" else out.read_bytes())
    if card is V1:
        assert (made.pop("spec"), made.pop("spec_version")) == ("chara_card_v2", "2.0")
        data = made.pop("data")
        assert made == V1
        assert V1.items() <= data.items()
        assert data["alternate_greetings"] == []
    else:
        data = made["data"]
    assert data["extensions"].pop("steer") == {"profile": PROFILE.dump()}
    if card is not V1:
        assert made == card
    if kind == "png":
        old, new = chunks(before), chunks(out.read_bytes())
        assert [c for c in new if c[1][:6] != b"chara\0"] == [c for c in old if c[1][:6] != b"chara\0"]
        assert [k for k, _ in new] == [k for k, _ in old]
        assert Image.open(out).tobytes() == Image.open(path).tobytes()


def test_a_profile_replaces_the_one_before_it_in_place(tmp_path: Path) -> None:
    own = V2["data"]["extensions"] | {"steer": {"profile": PROFILE.dump(), "theme": "dark"}}
    path = in_file(V2 | {"data": V2["data"] | {"extensions": own}}, "png", tmp_path)
    assert load_card(path).profile == PROFILE
    calm = Profile("calm")
    save_card_profile(path, calm, path)
    card = load_card(path)
    assert card.profile == calm
    assert card.extensions == own | {"steer": {"profile": calm.dump(), "theme": "dark"}}
    assert [p.name for p in tmp_path.iterdir()] == ["duke.png"]


@pytest.mark.parametrize("how", ["tEXt", "zTXt", "iTXt"])
def test_both_cards_of_a_png_get_the_profile_whatever_their_chunks(tmp_path: Path, how: str) -> None:
    path = tmp_path / "duke.png"
    path.write_bytes(png(how, Chara=encoded(V2), ccv3=encoded(V3)))
    out = save_card_profile(path, PROFILE, tmp_path / "out.png")
    texts = dict(body.split(b"\0", 1) for kind, body in chunks(out.read_bytes()) if kind == b"tEXt")
    for keyword, card in ((b"Chara", V2), (b"ccv3", V3)):
        made = json.loads(base64.b64decode(texts[keyword]))
        assert made["data"]["extensions"].pop("steer") == {"profile": PROFILE.dump()}
        assert made == card


def test_numbers_and_broken_characters_keep_their_meaning(tmp_path: Path) -> None:
    odd = V2 | {"x": [1e-300, 0.1, 12345678901234567890, -0.0, "half \ud83d", "😀", "\u2028", "\x00"]}
    path = in_file(odd, "json", tmp_path)
    made = json.loads(save_card_profile(path, PROFILE, tmp_path / "out.json").read_bytes().decode())
    assert made["x"] == odd["x"]


def test_a_card_keeps_its_kind_and_what_it_cannot_hold_is_not_written(tmp_path: Path) -> None:
    path = in_file(V2, "png", tmp_path)
    with pytest.raises(UsageError, match=r"out\.json: expected a name that ends in \.png"):
        save_card_profile(path, PROFILE, tmp_path / "out.json")
    with pytest.raises(SteerError, match=r"out\.png: .*at most 4,000,000 bytes"):
        save_card_profile(path, Profile("long", notes="x" * JSON_LIMIT), tmp_path / "out.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(png(ccv3=encoded(V3), chara="rubbish"))
    with pytest.raises(SteerError, match=r"broken\.png: text 'chara': expected base64"):
        save_card_profile(broken, PROFILE, tmp_path / "out.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.png", "duke.png"]


def test_direction_files_of_a_card_lie_beside_it(tmp_path: Path) -> None:
    path = in_file(V2, "json", tmp_path)
    beside = Profile("p", sliders=(ProfileSlider("dirs/duke.safetensors", 1),), folder=tmp_path)
    profile = load_card(save_card_profile(path, beside, path)).profile
    assert profile is not None
    assert profile.file_of(profile.sliders[0].slider) == tmp_path / "dirs" / "duke.safetensors"
    with pytest.raises(SteerError, match=r"in the card's folder, found '\.\./dirs/duke\.safetensors'"):
        save_card_profile(path, beside, tmp_path / "cards" / "duke.json")
    for stranger in (
        "/etc/x.safetensors",
        "../x.safetensors",
        "a/../../x.safetensors",
        "C:x.safetensors",
        r"\\h\x.safetensors",
    ):
        for slider in (
            {"slider": stranger, "amount": 1},
            {"slider": "a", "amount": 1, "when": {"while": {"slider": stranger, "above": 0}}},
        ):
            steer = {"steer": {"profile": {"name": "p", "sliders": [slider]}}}
            path.write_text(json.dumps({"data": V1 | {"extensions": steer}}))
            assert "found " + repr(stranger) in refused(path)


def deep(levels: int) -> bytes:
    """A card with so many levels of JSON."""
    inner = "[" * (levels - 3) + "]" * (levels - 3)
    return b'{"data": {"name": "Duke", "extensions": {"x": %s}}}' % inner.encode()


def test_json_up_to_the_limit_of_levels_is_read() -> None:
    assert load_card(deep(JSON_DEPTH)).name == "Duke"
    assert "nested over 64 deep" in refused(deep(JSON_DEPTH + 1))


PNG = png(chara=encoded(V2))
AT = PNG.index(b"tEXtchara") - 4
BOMB = zlib.compress(b"A" * 50_000_000, 9)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "expected a PNG or a JSON object, found a file that begins b''"),
        (b"GIF89a....", "save it as PNG or JSON"),
        (b"PK\x03\x04....", "pass its card.json"),
        (b"[1]", "expected a PNG or a JSON object"),
        (b"\x89PNG", "expected a PNG or a JSON object"),
        (PNG[:8], "expected a whole PNG, found 8 bytes that end within the chunk at byte 8"),
        (PNG[: AT + 100], "expected a whole PNG"),
        (PNG[:-12], "expected a whole PNG"),
        (PNG[:8] + b"\xff" * 40, "expected a PNG chunk at byte 8"),
        (PNG[:AT] + b"\x7f\xff\xff\xff" + PNG[AT + 4 :], "expected a whole PNG"),
        (PNG[:8] + struct.pack(">I4sI", 0, b"tEXt", 0) * 200_000, "at most 100,000 chunks"),
        (PNG[: AT + 20] + b"?" + PNG[AT + 21 :], "expected its checksum to match"),
        (png(), "found texts: 'software'"),
        (png(charab=encoded(V2)), "found texts: 'software', 'charab'"),
        (with_chunk(b"tEXt", b"chara"), "no end of the keyword"),
        (png(chara=""), "expected a character card in JSON"),
        (png(chara="not base64!"), "text 'chara': expected base64"),
        (png(chara=encoded(V2)[:-3]), "text 'chara': expected base64"),
        (png(chara=base64.b64encode(json.dumps(V2).encode()[:-9]).decode()), "expected a character card in JSON"),
        (png(chara=base64.b64encode(b"\xff{}").decode()), "not UTF-8 at 0"),
        (png(chara=encoded([V2])), "expected a JSON object, found ["),
        (png(chara=encoded("x" * 5000)), "expected a JSON object"),
        (png(chara=encoded("x" * JSON_LIMIT)), "at most 4,000,000 bytes"),
        (png(chara="A" * (2 * JSON_LIMIT + 1)), "at most 8,000,000 bytes"),
        (with_chunk(b"zTXt", b"chara\0\0" + BOMB), "at most 8,000,000 bytes"),
        (with_chunk(b"iTXt", b"ccv3\0\1\0\0\0" + BOMB), "at most 8,000,000 bytes"),
        (with_chunk(b"zTXt", b"chara\0\0" + BOMB[:99]), "found it cut short"),
        (with_chunk(b"zTXt", b"chara\0\0not deflated"), "expected a deflated text, found it damaged"),
        (with_chunk(b"iTXt", b"chara\0\1\0en"), "no end of the keyword"),
        (with_chunk(b"zTXt", b"chara\0"), "cut short"),
        (b"{" + b" " * FILE_LIMIT, "at most 20,000,000 bytes"),
        (b'{"a": "' + b"x" * JSON_LIMIT + b'"}', "at most 4,000,000 bytes"),
        (b'{"a": ' * 600_000, "nested over 64 deep"),
        (b'{"a": ' + b"[" * 3_000_000, "nested over 64 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "in JSON, found"),
        (b'{"a": 1e999}', "the number 1e999"),
        (b'{"a": NaN}', "the number NaN"),
        (b'{"name": "x", "version": "1", "description": "a package"}', "found none of alternate_greetings"),
        (b"{}", "expected a character card (name, description"),
        (b'{"name": "\xff"}', "not UTF-8"),
        (b'{"spec": "chara_card_v2"}', "found none of alternate_greetings"),
        (b'{"data": [1]}', "found `data` [1]"),
    ],
    ids=lambda v: shown(v)[:40],
)
def test_a_hostile_file_is_refused_in_one_line(data: bytes, says: str, tmp_path: Path) -> None:
    assert says in refused(data)
    (tmp_path / "card").write_bytes(data)
    with pytest.raises(SteerError):
        save_card_profile(tmp_path / "card", PROFILE, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["card"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extensions": {"steer": "noir"}}, "data: extensions: steer: expected a mapping"),
        ({"extensions": {"steer": {"profile": "noir"}}}, "data: extensions: steer: profile: expected a mapping"),
        ({"extensions": {"steer": {"profile": {"name": "a", "silders": []}}}}, "did you mean 'sliders'?"),
        (
            {"extensions": {"steer": {"profile": {"name": "a", "sliders": [{"slider": "b", "amount": 10**400}]}}}},
            "data: extensions: steer: profile: sliders[0]: amount: expected a finite number",
        ),
        ({"name": "D" * 100_000, "description": "{{char}}" * 100_000}, "macros that stand for at most 4,000,000"),
        ({"name": "D" * 10_000, "alternate_greetings": ["{{char}}"] * 1000}, "macros that stand for at most"),
        ({"system_prompt": "{{original}}" * 100_000}, "macros that stand for at most"),
    ],
    ids=lambda v: shown(v)[:60],
)
def test_a_wrong_profile_or_endless_macros_are_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    assert says in refused(json.dumps({"data": V1 | change}).encode())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ["Duke"]}, "name: expected text, found ['Duke']"),
        ({"description": ["a"]}, "description: expected text"),
        ({"first_mes": 3}, "first_mes: expected text, found 3"),
        ({"system_prompt": {"a": "b"}}, "system_prompt: expected text"),
        ({"creator_notes": True}, "creator_notes: expected text"),
        ({"alternate_greetings": "1687194031049"}, "alternate_greetings: expected a list, found '1687194031049'"),
        ({"alternate_greetings": ["Hi", 3, None, {}, [1]]}, "alternate_greetings: expected text, found 3"),
        ({"extensions": ["x"]}, "extensions: expected a mapping"),
        ({"character_book": "none"}, "character_book: expected a mapping"),
    ],
    ids=lambda v: shown(v)[:60],
)
def test_a_field_of_the_wrong_kind_counts_as_empty_with_one_warning(change: dict[str, Any], says: str) -> None:
    for card in ({"data": V1 | change}, V2 | {"data": V2["data"] | change}):
        loaded = load_card(json.dumps(card).encode(), filename="a/curio.png")
        (warning,) = loaded.warnings
        assert warning.startswith(f"card: {says}")
        assert warning.endswith("; it counts as empty")
        left = {k: v for k, v in card["data"].items() if k not in change}
        if change.get("alternate_greetings", ["", ""])[0] == "Hi":
            left["alternate_greetings"] = ["Hi"]
        wanted = load_card(json.dumps(card | {"data": left}).encode(), filename="a/curio.png")
        assert replace(loaded, warnings=()) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""}, {"name": None}, {"nickname": 0}, {"extensions": []}, {"alternate_greetings": [None]},
        {"character_book": None}, {"tags": "drama"}, {"x": 10**400}, {"character_book": []}, {"first_mes": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_empty_or_not_used_counts_as_absent_without_a_word(change: dict[str, Any]) -> None:
    absent = {"data": {k: v for k, v in V1.items() if k not in change}}
    wanted = load_card(json.dumps(absent).encode())
    assert load_card(json.dumps({"data": absent["data"] | change}).encode()) == wanted
    assert wanted.warnings == ()


def test_a_nameless_card_has_the_name_of_its_file(tmp_path: Path) -> None:
    path = in_file(V1 | {"name": " "}, "json", tmp_path)
    card = load_card(path)
    assert (card.name, card.sections["description"]) == ("duke", "duke rules Illyria and sighs at You.")
    assert load_card(path.read_bytes(), filename="Maria Bell.card.png").name == "Maria Bell.card"
    assert load_card(path.read_bytes()).name == "Character"


def test_flat_cards_of_every_sort_are_read_and_get_a_profile(tmp_path: Path) -> None:
    wanted = load_card(json.dumps(V2).encode())
    flat = V2["data"] | {"spec": "chara_card_v2", "spec_version": "2.0"}
    assert load_card(json.dumps(flat).encode()) == wanted
    pygmalion = {
        "char_name": V1["name"], "char_persona": V1["description"], "world_scenario": V1["scenario"],
        "char_greeting": V1["first_mes"], "example_dialogue": V1["mes_example"], "personality": V1["personality"],
    }  # fmt: skip
    assert load_card(json.dumps(pygmalion).encode()) == load_card(json.dumps(V1).encode())
    for number, card in enumerate((flat, pygmalion, {"name": "Curio", "scenario": "A hunt."}, {"first_mes": "Hi"})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(card))
        before = load_card(path)
        after = load_card(save_card_profile(path, PROFILE, path))
        assert after.profile == PROFILE
        assert (after.definition, after.first_message) == (before.definition, before.first_message)
        assert card.items() <= json.loads(path.read_text()).items()


@pytest.mark.parametrize("extensions", [["x"], "x", {"steer": "noir"}], ids=str)
def test_a_profile_does_not_replace_what_is_there(extensions: object, tmp_path: Path) -> None:
    path = in_file(V1 | {"extensions": extensions}, "json", tmp_path)
    with pytest.raises(SteerError, match="extensions: expected mappings"):
        save_card_profile(path, PROFILE, path)


def webp(comment: bytes, tag: int = 0x9286) -> bytes:
    """A WEBP picture with this comment in its EXIF data."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[tag] = comment
    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(out, "WEBP", exif=exif)
    return out.getvalue()


def test_a_webp_holds_a_card_in_its_comment(tmp_path: Path) -> None:
    card = json.dumps(V2).encode()
    wanted = load_card(card)
    for comment in (card, b"ASCII\0\0\0" + card, b"\0" * 8 + card, ",".join(map(str, card)).encode()):
        assert load_card(webp(comment)) == wanted
    for data, says in (
        (webp(b"a sunset"), "card in the WEBP's comment, found none"),
        (webp(b"1,2,999"), "expected bytes in the picture's comment"),
        (webp(card, 0x829A), "card in the WEBP's comment, found none"),
        (webp(card[:-9]), "expected a character card in JSON"),
        (webp(card)[:40], "expected a WEBP picture"),
    ):
        assert says in refused(data)
    path = tmp_path / "duke.webp"
    path.write_bytes(webp(card))
    with pytest.raises(UsageError, match="WEBP, which is only read"):
        save_card_profile(path, PROFILE, path)


def test_macros_that_are_not_known_stay_and_are_warned_of_once() -> None:
    data = V1 | {"first_mes": "{{frob}} {{Frob}} {{roll:x}} {{time}}", "scenario": "{{frob}}"}
    data |= {"character_book": {"entries": [{"keys": ["x"], "content": "{{glim::a}} {{persona}}"}]}}
    card = load_card(json.dumps({"data": data}).encode(), persona="A page.")
    assert card.warnings == ("card: macros that are not known stay as they are: {{frob}}, {{glim}}, {{roll}}",)
    assert card.first_message.startswith("{{frob}} {{Frob}} {{roll:x}} ")
    assert "{{" not in card.first_message[30:]


def test_fields_stand_in_each_other_and_not_for_ever_in_themselves() -> None:
    data = {"name": "Ann", "description": "D({{personality}}|{{description}})", "personality": "P({{description}})"}
    card = load_card(json.dumps({"data": data | {"system_prompt": "{{Scenario}}{{charPrompt}}."}}).encode())
    assert card.sections == {
        "description": "D(P()|D(|))",
        "personality": "Ann's personality: P(D(|))",
    }
    assert card.definition.startswith(".")
    assert card.warnings == ()


def test_a_seed_draws_the_same_greeting_and_another_another() -> None:
    data = json.dumps({"data": V1 | {"first_mes": "{{random:a,b,c,d,e,f,g,h}}{{roll:100}}"}}).encode()
    greetings = [load_card(data, seed=seed).first_message for seed in (0, 0, 1, 2, 3)]
    assert greetings[0] == greetings[1]
    assert len(set(greetings)) == 4


def test_a_path_that_is_no_card_is_one_line(tmp_path: Path) -> None:
    assert "expected a character card, found none" in refused(tmp_path / "absent.png")
    assert "found a directory" in refused(tmp_path)
    big = tmp_path / "big.png"
    with open(big, "wb") as f:
        f.truncate(FILE_LIMIT + 1)
    assert "at most 20,000,000 bytes" in refused(big)


def flipped(data: bytes, rng: random.Random) -> bytes:
    """With one to eight bits turned over."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def spliced(data: bytes, rng: random.Random) -> bytes:
    """With a part of it written over another part."""
    a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 64)
    return data[:a] + data[b : b + n] + data[a + n :]


@pytest.mark.parametrize("damage", [flipped, cut, spliced])
@pytest.mark.parametrize("kind", ["png", "inside", "json"])
def test_no_damage_gets_past_the_one_line(kind: str, damage: Callable[[bytes, random.Random], bytes]) -> None:
    rng = random.Random(f"{kind} {damage.__name__}")
    own = {"extensions": {"steer": {"profile": PROFILE.dump()}}}
    card = json.dumps(V3 | {"data": V3["data"] | own}).encode()
    image = io.BytesIO()
    info = PngInfo()
    info.add_text("ccv3", base64.b64encode(card).decode())
    Image.new("L", (4, 4)).save(image, "PNG", pnginfo=info)
    messages: list[str] = []
    for _ in range(300):
        if kind == "inside":
            data = png(ccv3=base64.b64encode(damage(card, rng)).decode())
        else:
            data = damage(image.getvalue() if kind == "png" else card, rng)
        try:
            assert isinstance(load_card(data), Card)
        except SteerError as e:
            messages.append(str(e))
    assert len(messages) > 50
    assert all(m.isprintable() for m in messages)
