"""Chats through every kind of template: nothing is lost, nothing is changed in silence, control tokens stay single."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from template_kinds import FOLDED, JOINED, KINDS, LATER, OPENED, Kind
from tiny_chat import SPECIAL, save_tiny_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steer.checkpoint.chat_templates import chosen_template, shipped_templates
from steer.errors import CheckpointError, UsageError
from steer.model.chat_template import OPENING
from steer.model.loaded import WITHOUT_THOUGHTS
from steer.model.steered import SteeredModel, load

S, A, B, C, D = ({"role": r, "content": c} for r, c in (
    ("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("system", "D")))  # fmt: skip
CHATS: dict[str, list[dict[str, str]]] = {
    "plain": [A, B, C],
    "system": [S, A],
    "two systems": [S, A, B, C, D],
    "greeting": [S, B, A],
    "two users": [A, C],
}
MEANT = {JOINED: "joined", LATER: "sent as the user's", OPENED: "put before the greeting", FOLDED: "first user turn"}


@pytest.fixture(scope="module")
def place(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a token for each byte and for each control token of the kinds of templates."""
    controls = dict.fromkeys([*SPECIAL, *(t for kind in KINDS.values() for t in kind.tokens)])
    words = [*controls, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tiny_llama(tmp_path_factory.mktemp("kinds") / "m", vocab_size=len(words))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=list(controls)[3:], chat_template="{{ messages }}",
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(place: Path) -> SteeredModel:
    return load(place)


@pytest.fixture
def use(model: SteeredModel) -> Callable[[Any], SteeredModel]:
    """`use(template)` gives the model that template."""

    def use(template: Any) -> SteeredModel:
        model.tokenizer.chat_template = template
        return model

    return use


def text_of(model: SteeredModel, *args: Any, **more: Any) -> str:
    return model.tokenizer.decode(model.prompt(*args, **more).ids)


def whole(model: SteeredModel, chat: list[dict[str, str]]) -> str:
    return model.tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_shelf_is_long_enough() -> None:
    assert len(KINDS) >= 25


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_takes_every_chat_whole(use: Callable[[Any], SteeredModel], name: str) -> None:
    kind: Kind = KINDS[name]
    model = use(kind.template)
    assert text_of(model, CHATS["system"]) == kind.system
    assert text_of(model, [A], "B") == kind.prefill
    for case, chat in CHATS.items():
        prompt = model.prompt(chat)
        text = model.tokenizer.decode(prompt.ids)
        found = " ".join(prompt.notes)
        wanted = kind.refuses.get(case, ())
        assert {w for w in MEANT if MEANT[w] in found} == set(wanted), case
        assert len(prompt.notes) == len(wanted), case
        for m in chat:
            assert m["content"] in text, case
        assert (OPENING in text) == (OPENED in wanted), case
        assert prompt.ids.count(model.tokenizer.bos_token_id) <= max(1, text.count("<s>[INST]")), case
        # Every control token that the template writes is one token.
        for token in kind.tokens:
            assert prompt.ids.count(model.tokenizer.convert_tokens_to_ids(token)) == text.count(token), case


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("reply", ["yes", "yes, ", "\n yes\n"])
def test_a_begun_reply_ends_where_the_templates_own_rendering_would(
    use: Callable[[Any], SteeredModel], name: str, reply: str
) -> None:
    if name == "the user last":
        pytest.skip("it renders no reply")
    model = use(KINDS[name].template)
    prompt = model.prompt([A], reply)
    text = model.tokenizer.decode(prompt.ids)
    own = whole(model, [A, {"role": "assistant", "content": reply}])
    assert own.startswith(text)
    assert text.rstrip().endswith("yes" if "," not in reply else "yes,")
    begun = model.tokenizer.decode(prompt.ids[len(prompt.ids) - prompt.begun :])
    assert begun.strip() == reply.strip()


def test_a_begun_thought_goes_on_where_the_template_opens_it(use: Callable[[Any], SteeredModel]) -> None:
    model = use(KINDS["thoughts dropped from the past and opened for the reply"].template)
    head = "<s><|User|>A<|Assistant|><think>\n"
    assert text_of(model, [A], "<think>\nso") == head.rstrip("\n") + "\nso"
    assert text_of(model, [A], "<think>so</think>yes") == head + "so</think>yes"
    assert model.prompt([A]).opening == "<think>"


def test_thoughts_are_left_out_by_whatever_switch_there_is(use: Callable[[Any], SteeredModel]) -> None:
    for name, ends in (
        ("a switch for thoughts, empty ones in the last reply", "assistant\n<think>\n\n</think>\n\n"),
        ("thoughts dropped from the past and opened for the reply", "<|Assistant|><think>\n\n</think>\n\n"),
    ):
        model = use(KINDS[name].template)
        prompt = model.prompt([A], options=WITHOUT_THOUGHTS)
        assert model.tokenizer.decode(prompt.ids).endswith(ends)
        assert (prompt.opening, prompt.notes) == ("", ())
        assert model.prompt_ids([A], thoughts=False) == prompt.ids != model.prompt_ids([A])
    model = use(KINDS["a switch with another name"].template)
    assert text_of(model, [A], options={"enable_thinking": True}).startswith("Think first.")
    assert model.prompt([A], options={"enable_thinking": True}).notes == ()
    model = use(KINDS["chatml"].template)
    assert text_of(model, [A], options=WITHOUT_THOUGHTS) == text_of(model, [A])
    assert "no option enable_thinking" in model.prompt([A], options=WITHOUT_THOUGHTS).notes[0]
    model = use(KINDS["a date and tools in the system turn"].template)
    assert "Today: 1 May" in text_of(model, [A], options={"date_string": "1 May"})


def test_a_model_without_thoughts_is_not_said_to_ignore_the_wish_for_none(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(save_tiny_chat(tiny_llama, tmp_path / "m"))
    assert model.prompt([A], options=WITHOUT_THOUGHTS).notes == ()
    assert "no option enable_thinking" in model.prompt([A], options={"enable_thinking": True}).notes[0]


@pytest.mark.parametrize(
    ("marks", "template"),
    [
        ("<think> </think>", KINDS["a switch for thoughts, empty ones in the last reply"].template),
        ("[THINK] [/THINK]", KINDS["thoughts as special tokens"].template),
        (
            "<|channel|>analysis<|message|> <|end|><|start|>assistant<|channel|>final<|message|>",
            KINDS["channels"].template,
        ),
    ],
)
def test_the_answer_begins_after_the_thoughts(use: Callable[[Any], SteeredModel], marks: str, template: Any) -> None:
    model = use(template)
    opened, closed = marks.split()

    def after(text: str, opening: str = "") -> str:
        ids = model.encode(text)
        return model.tokenizer.decode(ids[model.answer_start(ids, opening) :])

    assert after(f"{opened}so so{closed}\n\nyes") == "yes"
    assert after(f"so so{closed}yes", opened) == "yes"
    assert after(f"{opened}{closed}yes") == "yes"
    assert after(f"{opened}so so") == ""
    assert after("yes") == after("yes", "") == "yes"
    assert after(" <b>yes") == " <b>yes"
    assert after("") == ""


def test_what_was_changed_is_said_once(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(place)
    caplog.clear()
    model.tokenizer.chat_template = KINDS["system refused, the role is model"].template
    with caplog.at_level(logging.WARNING, "steer"):
        for _ in range(2):
            model.prompt([S, A])
            model.prompt([A])
    assert [r.getMessage() for r in caplog.records] == [
        f"{model.name}: its chat template does not take this chat as it is: the system prompt is sent in the first "
        "user turn"
    ]


def test_a_chat_that_no_form_saves_is_refused_with_the_templates_words(use: Callable[[Any], SteeredModel]) -> None:
    with pytest.raises(UsageError, match="refuses this chat: never"):
        use("{{ raise_exception('never') }}").prompt([S, A])
    with pytest.raises(UsageError, match="refuses this chat"):
        use("{{ messages[7].content }}{{ 1 / 0 }}").prompt([A])


def test_a_message_that_no_form_shows_is_named(use: Callable[[Any], SteeredModel]) -> None:
    model = use("{{ messages[-1].content }}")
    assert text_of(model, [A, B, C]) == "C"
    (note,) = model.prompt([A, B, C]).notes
    assert "leaves out message 1 (user), message 2 (assistant)" in note


def test_a_broken_template_and_none_at_all_are_one_line_each(use: Callable[[Any], SteeredModel]) -> None:
    with pytest.raises(CheckpointError, match="a mistake in line 2") as e:
        use("\n{% for %}").prompt([A])
    assert "\n" not in str(e.value)
    for nothing in (None, "", {"tool_use": "x"}):
        with pytest.raises(CheckpointError, match=r"expected (a|one) chat template.*--chat-template") as e:
            use(nothing).prompt([A])
        assert "\n" not in str(e.value)


def test_messages_that_are_empty_are_no_loss(use: Callable[[Any], SteeredModel]) -> None:
    model = use(KINDS["system refused, the role is model"].template)
    empty = {"role": "system", "content": ""}
    assert text_of(model, [empty, A]) == "<s><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("name", shipped_templates())
def test_a_template_that_ships_takes_every_chat_and_ends_a_reply(use: Callable[[Any], SteeredModel], name: str) -> None:
    model = use(chosen_template(name))
    for case, chat in {**CHATS, "system alone": [S]}.items():
        text = text_of(model, chat)
        for m in chat:
            assert m["content"] in text, case
        assert text.count("<s>") == 1
    text = text_of(model, [A], "yes")
    assert text.endswith("yes")
    assert whole(model, [A, {"role": "assistant", "content": "yes"}]).startswith(text)
    assert not model.prompt([S, A, B, C]).notes


def test_the_templates_that_ship_are_the_documented_ones() -> None:
    assert shipped_templates() == ["alpaca", "chatml", "gemma", "llama3", "mistral", "plain"]


def test_load_takes_a_template_by_name_file_or_variable(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_of(load(place, chat_template="alpaca"), [A]) == "<s>### Instruction:\nA\n\n### Response:\n"
    file = tmp_path / "mine.jinja"
    monkeypatch.setenv("STEER_CHAT_TEMPLATE", str(file))
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("{{ messages[0].content }}|", encoding=encoding)
        assert text_of(load(place), [A]) == "A|"
    file.write_bytes(b"\xff")
    for wrong, says in ((str(tmp_path), "could not be read"), (str(file), "UTF-8"), ("chatlm", "found neither")):
        with pytest.raises(UsageError, match=says) as e:
            load(place, chat_template=wrong)
        assert "\n" not in str(e.value)
        assert str(e.value).startswith(f"--chat-template {wrong}: ")
