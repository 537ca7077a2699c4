"""Features by words, by trait, and by what fires on a message."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from feature_indexes import M, keep_dictionary
from tiny_chat import hooks_on

from steer.chat.descriptions import description, record_of, title, title_of
from steer.checkpoint.library import dictionary_at
from steer.core.feature import Feature
from steer.core.slider import Slider
from steer.errors import UsageError
from steer.sae.records import Context

pytestmark = pytest.mark.filterwarnings("ignore::steer.model.fit_check.FitWarning")


@pytest.fixture
def place(model):
    return keep_dictionary(model)


@pytest.fixture
def features(place, chat):
    return chat.features


def test_words_are_looked_for_in_tokens_and_contexts(features):
    found = features.search("mercy US")
    assert [c.record.index for c in found] == [20, 15, 10, 5]
    assert found[-1].title == "on \u201cmercy\u201d"
    assert len(features.search("", limit=7)) == 7
    assert features.search("zebra") == []


def test_without_words_those_that_indicate_a_trait_come_first(features):
    found = features.search("", limit=4)
    assert [c.record.index for c in found] == [M - 1, M - 2, M - 3, M - 4]
    assert found[0].title == "with moralizing (feature 23)"


def test_a_label_that_says_nothing_is_no_title(features):
    record = replace(features.search("mercy")[0].record, traits={})
    assert title(record) == "on \u201cmercy\u201d"
    common = [Context("", word, "", 1.0) for word in ("of", "of", "wax")]
    assert title(replace(record, contexts=common)) == "feature 20"


def test_a_description_names_no_rest_of_a_word_no_mark_of_the_template_and_no_word_that_any_text_has(features):
    record = features.search("mercy")[0].record
    contexts = [Context("have ", token, " on us", 1.0) for token in (" and", ".", " mercy")]
    tokens = [(" the", 4.0), ("<|endoftext|>", 3.0), ("emeteries", 2.0), (" pity", 1.0)]
    said = description(replace(record, contexts=contexts, top_tokens=tokens))
    assert said.endswith("as on \u201cmercy\u201d; adding it makes \u201cpity\u201d likelier.")
    assert "adding" not in description(replace(record, contexts=contexts, top_tokens=tokens[:3]))
    assert description(replace(record, contexts=contexts[1:2])).split(";")[0].endswith("as on \u201c.\u201d")


def test_the_surest_features_of_a_trait_come_first(features):
    assert features.traits() == ["moralizing"]
    found = features.search(trait="moralizing", limit=3)
    assert [c.record.index for c in found] == [M - 1, M - 2, M - 3]
    assert found[0].record.traits["moralizing"].auroc == pytest.approx(0.96)
    assert found[0].record.traits["moralizing"].q == 0.01
    with pytest.raises(UsageError, match="steer find"):
        features.search(trait="kindness")


def test_a_card_shows_what_is_known_and_pins_by_its_name(features, chat, place):
    cards = {c.record.index: c for c in features.search("", limit=M)}
    assert cards.keys() == set(range(2, M))
    card = cards[5]
    dictionary = dictionary_at(place)
    assert (card.name, card.site, card.record.rate, card.record.unit) == ("L1/5", 1, pytest.approx(0.06), 1.0)
    assert card.share == pytest.approx(float(dictionary.decoder_rows([5]).norm()) / 5.0, rel=1e-5)
    assert card.output_score == {"moralizing": 0.75}
    assert cards[6].output_score == {}
    assert card.nearest == [("L1/6", "on \u201csin\u201d", 0.5)]
    assert card.record.contexts[0].before == "have "
    assert chat.panel.pin(card.name).title == card.title


def test_what_fires_on_a_message_is_what_the_dictionary_reads_there(features, model, place):
    ids = model.prompt_ids([{"role": "user", "content": "hello friend truth"}])
    words = model.tokenizer("hello friend truth", add_special_tokens=False).input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + 3] == words)
    with model.record([1]) as recording, torch.inference_mode():
        model.hf(torch.tensor([ids]))
    dictionary = dictionary_at(place)
    acts = dictionary.encode(recording[1][0, start : start + 3].float())
    units = torch.tensor([float("inf")] * 2 + [0.5 + 0.1 * i for i in range(2, M)])
    strength = acts / units
    found = features.fires_on("hello friend truth", limit=5)
    wanted = strength.amax(0).sort(descending=True)
    assert [f.card.record.index for f in found] == wanted.indices[:5].tolist()
    assert [f.strength for f in found] == pytest.approx(wanted.values[:5].tolist(), rel=1e-4)
    for f in found:
        assert "".join(p for p, _ in f.marks).strip() == "hello friend truth"
        assert [s for _, s in f.marks] == pytest.approx(strength[:, f.card.record.index].tolist(), rel=1e-4, abs=1e-6)
    assert hooks_on(model) == 0


def test_sliders_have_no_say_in_what_fires(features, chat):
    before = features.fires_on("hello friend")
    chat.panel.set("moral", 3.0)
    chat.say("hello friend")
    again = features.fires_on("hello friend")
    assert chat.writer.wait(20)
    assert [f.strength for f in again] == [f.strength for f in before]


def test_messages_that_cannot_be_read_are_refused(features):
    with pytest.raises(UsageError, match="expected some text"):
        features.fires_on("  ")
    with pytest.raises(UsageError, match="at most 512 tokens"):
        features.fires_on("hello " * 600)


def test_a_model_without_a_dictionary_has_an_empty_shelf(chat):
    features = chat.features
    assert features.dictionaries == features.traits() == features.search("mercy") == features.fires_on("hello") == []


@pytest.mark.filterwarnings("ignore::steer.errors.SkippedWarning")
def test_a_dictionary_whose_labels_are_broken_is_named_and_the_others_stay(model, place, chat):
    broken = keep_dictionary(model, "second", site=2) / "features.jsonl"
    broken.write_bytes(broken.read_bytes() + b'{"index": 3}\n')
    features = chat.features
    assert features.dictionaries == ["tiny"]
    assert features.search("mercy")
    (line,) = features.problems
    assert line.startswith(f"{broken}, line 23: expected a latent's record, found no 'rate'")
    assert "\n" not in line


@pytest.mark.filterwarnings("ignore::steer.errors.SkippedWarning")
@pytest.mark.parametrize(
    "data", [b"\xff\n", b'{"index": 1e999}\n', b'{"index": 5, "rate": ' + b"9" * 400 + b"}\n", b"[3]\n"]
)
def test_whatever_is_wrong_with_labels_sliders_are_still_called_something(place, chat, data):
    (place / "features.jsonl").write_bytes(data)
    feature = Feature.latent(dictionary_at(place), 5, 1.0)
    assert (title_of(Slider(feature)), record_of(feature)) == (feature.name, None)
    assert chat.features.dictionaries == []


def test_latents_of_a_strangers_labels_that_cannot_be_moved_are_not_found(place, chat):
    file = place / "features.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["unit"], rows[1]["unit"], rows[2]["index"], rows[3]["rate"] = float("nan"), 0.0, 10**9, float("nan")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {c.record.index for c in chat.features.search("", limit=M)}
    assert found == set(range(5, M))
    assert len(chat.features.search(trait="moralizing", limit=M)) == len(found)
