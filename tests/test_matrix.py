"""Everything that steer does x every architecture that it lists, beside plain eager transformers in fp64.

The checkpoints are loud (`loud_anatomies`): whatever an architecture adds to a plain decoder changes the logits by more
than any tolerance here, so that a cell that left it out would fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from batched import ask, job
from loud_anatomies import LOUD, Loud, without
from tiny_anatomies import BLOCKS, VOCAB, WIDTH, ablated
from tiny_anatomies import load as load_plain
from tiny_chat import replies_of
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from steer.baking.bake import bake
from steer.checkpoint.sketch import sketch_files
from steer.core.dictionary import Dictionary
from steer.core.direction import Direction
from steer.core.edit import Edit
from steer.core.sampler import Sampler
from steer.errors import UnsupportedError, UsageError
from steer.measure.contrast import Reply, reply_means
from steer.measure.harness import Reference, row_costs
from steer.model.forward import hidden_states
from steer.model.prefill import prefill
from steer.model.steered import SteeredModel, load
from steer.sae.attribution import attribution
from steer.sae.documents import Document
from steer.sae.logit_lens import lens_topk
from steer.sae.passes import passes
from steer.sae.splice import cross_entropies
from steer.serve.batching import BatchingEngine

ROUNDING = 2e-5
"""Norms and softmax of transformers are in fp32, whatever the weights are."""
SITE = 1
GREEDY = Sampler(max_new_tokens=8, temperature=0, repetition_penalty=1.0)
TEXTS = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(1))
CONSTANTS = {"llama", "llama tied", "gpt2", "gpt-neox", "gpt-neox sequential", "gpt-oss"}
"""Whose checkpoints can hold an add."""
CELLS = (
    "find", "sketch", "lens", "fluency", "attribution", "splice", "harvest", "chat", "serve", "hooks",
    "TransformerLens", "bake", "adapter",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture: its checkpoint, as steer loads it and as transformers does."""

    name: str
    loud: Loud
    place: Path
    model: SteeredModel
    plain: Any

    @torch.no_grad()
    def logits(self, ids: Tensor, edit: Edit | None = None) -> Tensor:
        """What transformers computes, under an edit whose hooks the table under test does not place."""
        with nullcontext() if edit is None else ablated(self.loud.tiny, self.plain, edit):
            return self.plain(ids).logits

    def logprobs(self, ids: Tensor, edit: Edit | None = None) -> Tensor:
        return self.logits(ids, edit).log_softmax(-1)

    @torch.no_grad()
    def residuals(self, ids: Tensor) -> list[Tensor]:
        """After each block."""
        seen: list[Tensor] = []
        blocks = [self.plain.get_submodule(self.loud.tiny.block.format(b)) for b in range(BLOCKS)]
        handles = [
            b.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
            for b in blocks
        ]
        try:
            self.plain(ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def at_site(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The residual stream after block `SITE` changed."""

        def hook(_m: object, _a: object, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = self.plain.get_submodule(self.loud.tiny.block.format(SITE)).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    transformers.logging.disable_progress_bar()
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            place = LOUD[name].save(tmp_path_factory.mktemp("loud") / "model")
            hf = load(place, dtype=torch.float64).hf
            hf.generation_config.eos_token_id = []
            # AutoTokenizer would take a class of the architecture's own, which does not know these tokens.
            model = SteeredModel(hf, PreTrainedTokenizerFast.from_pretrained(place), name, place)
            made[name] = Case(name, LOUD[name], place, model, load_plain(place))
        return made[name]

    return get


@pytest.fixture(params=LOUD)
def case(cases: Callable[[str], Case], request: pytest.FixtureRequest) -> Case:
    return cases(request.param)


@pytest.fixture(scope="module")
def ablation(make_direction: Callable[..., Direction]) -> Edit:
    """Of every block, which every form of a bake can hold."""
    return Edit(ablate=(make_direction(), make_direction("b", site=2, seed=8)), blocks=(0, BLOCKS - 1))


def dictionary() -> Dictionary:
    torch.manual_seed(0)
    rows = torch.randn(24, WIDTH, dtype=torch.float64) / WIDTH**0.5
    bias = torch.zeros(24, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    return Dictionary("standard", rows.T.contiguous(), bias[0], 2 * rows, bias[1], site=SITE)


REPLIES = ["lie ba be bi", "well lie friend bo bu da de di do", "da"]


def test_every_addition_of_an_architecture_is_loud(case: Case) -> None:
    plain = case.logits(TEXTS)
    assert plain.abs().max() > 1
    for name, silence in case.loud.silence.items():
        with torch.no_grad():
            assert (without(case.plain, silence)(TEXTS).logits - plain).abs().max() > 0.5, name


def test_find_means_of_replies_are_those_of_the_residual_stream(case: Case) -> None:
    answers = replies_of(case.model, REPLIES)
    assert [len(r.ids) for r in answers] == [4, 9, 1]
    for reply, means in zip(answers, reply_means(case.model, answers), strict=True):
        prompt = case.model.prompt_ids(reply.chat)
        for stream, mean in zip(case.residuals(torch.tensor([[*prompt, *reply.ids]])), means, strict=True):
            expected = stream[0, len(prompt) :].mean(0)
            torch.testing.assert_close(mean.double(), expected, atol=ROUNDING * 10, rtol=ROUNDING)


def test_sketch_knows_its_own_files_and_no_others(case: Case, tmp_path: Path) -> None:
    files = sketch_files(case.place)
    live = SteeredModel(case.model.hf, case.model.tokenizer).sketch()
    assert files.values.size >= 32 * BLOCKS
    assert files.distance(files) == files.distance(live) == 0
    changed = load_plain(case.place)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    other = SteeredModel(changed, case.model.tokenizer).sketch()
    assert 0.01 < files.distance(other) < 0.04
    assert not files.same_as(other)


def test_lens_is_the_derivative_of_the_logits_at_a_fixed_scale_of_the_final_norm(case: Case) -> None:
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # A state at a right angle to the rows and to their means: moving along them changes no norm's scale.
    spanned = torch.linalg.qr(torch.cat([rows, torch.ones(1, WIDTH)]).T.double())[0]
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = state - spanned @ (spanned.T @ state)
    state = state * (WIDTH**0.5 / state.norm())
    base = case.plain.base_model
    final = next(m for n, m in base.named_children() if n in ("norm", "ln_f", "final_layer_norm"))

    def logits(h: Tensor) -> Tensor:
        return case.plain.get_output_embeddings()(final(h))

    step = 1e-3
    expected = torch.stack([(logits(state + step * r) - logits(state - step * r)) / (2 * step) for r in rows])
    (values, ids), _ = lens_topk(case.model, rows, VOCAB)
    found = torch.zeros(3, VOCAB, dtype=torch.float64).scatter_(1, ids, values.double())
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    ungained = rows @ case.plain.get_output_embeddings().weight.T
    assert (ungained - expected).abs().max() > 0.1
    # The bias of a LayerNorm is no part of what a row adds.
    assert expected.abs().max() > 0.5


def test_fluency_and_divergence_are_those_of_the_logits(case: Case, ablation: Edit) -> None:
    text = TEXTS[0].tolist()
    expected = case.logprobs(TEXTS[:1])[0]
    (_, entropy), (kl, edited) = row_costs(case.model, [(text[:5], text[5:])], [ablation])
    after = case.logprobs(TEXTS[:1], ablation)[0]
    said = TEXTS[0, 5:, None]
    assert kl == pytest.approx(float((expected.exp() * (expected - after))[4:-1].sum(-1).mean()), abs=ROUNDING)
    assert entropy == pytest.approx(-float(expected[4:-1].gather(1, said).mean()), abs=ROUNDING)
    assert edited == pytest.approx(-float(after[4:-1].gather(1, said).mean()), abs=ROUNDING)
    assert kl > 0.01
    answers = replies_of(case.model, REPLIES)
    total, tokens = 0.0, 0
    for reply in answers:
        prompt = case.model.prompt_ids(reply.chat)
        ids = torch.tensor([[*prompt, *reply.ids]])
        base, other = (case.logprobs(ids, e)[0, len(prompt) - 1 : -1] for e in (None, ablation))
        total, tokens = total + float((base.exp() * (base - other)).sum()), tokens + len(reply.ids)
    (found,) = Reference.of(case.model, answers).kls(case.model, [ablation])
    assert found == pytest.approx(total / tokens, abs=ROUNDING)


def test_texts_under_several_edits_are_read_as_each_alone(case: Case, make_direction) -> None:
    """Blocks before the first edit read a text once for all edits: masks, angles and caches are widened after them."""
    edits = [None, Edit(add=((make_direction(site=1), 0.7),)), Edit(add=((make_direction("b", site=2, seed=8), -2.0),))]
    texts = [[1, 5, 7, 9, 11, 6], [1, 5, 8, 10, 4], [1, 5, 7, 9, 3, 2]]
    rows = [(e, t) for t in texts for e in range(len(edits))]
    with case.model.steering.applied(edits):
        assert case.model.steering.untouched_blocks == 1
        which = [e for e, _ in rows]
        read = prefill(case.model, [t for _, t in rows], prompts=[4] * len(rows), which=which).hidden
    for (e, text), hidden in zip(rows, read, strict=True):
        with case.model.steering.applied([edits[e]]), torch.inference_mode():
            whole = hidden_states(case.model, torch.tensor([text]))[0, 3:]
        torch.testing.assert_close(hidden[-len(whole) :], whole, rtol=ROUNDING, atol=ROUNDING * 10)


def test_attribution_is_the_gradient_through_the_whole_model(case: Case) -> None:
    d, answers = dictionary(), replies_of(case.model, REPLIES)
    found = attribution(case.model, d, answers[:2], answers[2:], range(d.latents))

    def expected(reply: Reply) -> Tensor:
        prompt = case.model.prompt_ids(reply.chat)
        ids = torch.tensor([[*prompt, *reply.ids]])
        leaf: list[Tensor] = []

        def cut(h: Tensor) -> Tensor:
            leaf.append(h.detach().requires_grad_())
            return leaf[0]

        with case.at_site(cut):
            logprobs = case.plain(ids).logits[0].log_softmax(-1)
        own = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).mean()
        (gradient,) = torch.autograd.grad(own, leaf[0])
        along = gradient[0, len(prompt) :] @ d.W_dec.T
        return (d.encode(leaf[0][0, len(prompt) :].detach()) * along).sum(0)

    wanted = torch.stack([expected(r) for r in answers[:2]]).mean(0) - expected(answers[2])
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-3)
    assert wanted.abs().max() > 1e-2


def test_splice_losses_are_those_of_the_logits(case: Case) -> None:
    d = dictionary()
    rows = TEXTS.tolist()
    found = cross_entropies(case.model, d, rows)
    stream = case.residuals(TEXTS)[SITE]
    mean = stream[:, 1:].reshape(-1, WIDTH).mean(0)

    def loss() -> float:
        with torch.no_grad():
            logits = case.plain(TEXTS).logits[:, 1:-1]
        return float(cross_entropy(logits.reshape(-1, VOCAB), TEXTS[:, 2:].reshape(-1)))

    def replaced(by: Callable[[Tensor], Tensor]) -> float:
        with case.at_site(lambda h: torch.cat([h[:, :1], by(h[:, 1:])], dim=1)):
            return loss()

    assert found.plain == pytest.approx(loss(), abs=ROUNDING)
    assert found.spliced == pytest.approx(replaced(d.reconstruct), abs=ROUNDING)
    assert found.ablated == pytest.approx(replaced(lambda h: mean.expand_as(h)), abs=1e-4)
    assert max(abs(found.ablated - found.plain), abs(found.spliced - found.plain)) > 0.02


def test_harvest_reads_the_residual_stream(case: Case) -> None:
    documents = [(n, Document(ids, [False] * len(ids))) for n, ids in enumerate(TEXTS.tolist())]
    documents.append((2, Document(TEXTS[0, :5].tolist(), [False] * 5)))
    (found,) = passes(case.model, documents, [0, BLOCKS - 1], batch_tokens=1000)
    streams = case.residuals(TEXTS)
    for n, ids in ((0, TEXTS[0]), (1, TEXTS[1]), (2, TEXTS[0, :5])):
        for site, h in found.residuals.items():
            torch.testing.assert_close(
                h[found.document == n], streams[site][n % 2, : len(ids)], atol=1e-4, rtol=ROUNDING
            )


def written(case: Case, prompt: list[int], edit: Edit | None) -> list[int]:
    """The greedy reply by whole forward passes of transformers, its end token included."""
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(case.logits(torch.tensor([ids]), edit)[0, -1].argmax()))
        if ids[-1] in case.model.end_token_ids:
            break
    return ids[len(prompt) :]


def test_chat_writes_what_whole_passes_write(case: Case, ablation: Edit) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("hello", "lie ba be bi bo bu da de", "truth")]
    edits = [None, ablation, ablation]
    found = case.model.replies(chats, GREEDY, edits)
    prompts = [case.model.prompt_ids(c) for c in chats]
    ends = case.model.end_token_ids  # which replies leave out
    assert found == [[t for t in written(case, p, e) if t not in ends] for p, e in zip(prompts, edits, strict=True)]
    with case.model.edited(ablation):
        alone = case.model.replies(chats[1:2], GREEDY)
    assert alone == found[1:2]
    read = torch.tensor([prompts[1]])
    assert (case.logits(read, ablation) - case.logits(read)).abs().max() > 0.05


def test_serve_writes_to_each_what_whole_passes_write(case: Case, ablation: Edit) -> None:
    jobs = [
        job(TEXTS[0].tolist(), GREEDY, None, key=0),
        job(TEXTS[1, :6].tolist(), GREEDY, ablation, key=1),
        job(TEXTS[1, 3:].tolist(), GREEDY, None, key=2),
    ]
    own = case.model.hf.config._attn_implementation
    if case.model.anatomy.rotary_limit == 2:
        # Where rotary factors go by the longest text of a step, no text may be so long.
        engine = BatchingEngine(case.model, max_running=4)
        with closing(engine), pytest.raises(UsageError, match="expected at most 2 tokens"):
            ask(engine, jobs[0])
        return
    with closing(BatchingEngine(case.model, max_running=4, context=64)) as engine:
        found = [listener.wait().tokens for listener in [ask(engine, one) for one in jobs]]
    assert found == [written(case, list(j.prompt), j.edit()) for j in jobs]
    assert case.model.hf.config._attn_implementation == own


def test_hooks_on_a_plain_model_do_what_the_bake_does(case: Case, ablation: Edit) -> None:
    handles = [case.plain.get_submodule(n).register_forward_hook(h) for n, h in case.model.hooks(ablation)]
    try:
        found = case.logits(TEXTS)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, case.logits(TEXTS, ablation), atol=1e-6, rtol=0)
    assert (found - case.logits(TEXTS)).abs().max() > 0.05


def test_hooks_in_a_transformer_lens_bridge_do_what_the_bake_does(
    case: Case, ablation: Edit, make_direction: Callable[..., Direction]
) -> None:
    everything = Edit(ablate=ablation.ablate, add=((make_direction("c", seed=9), -0.5),))
    bridge = TransformerBridge.boot_transformers(str(case.place), device="cpu", hf_model=load_plain(case.place))
    hooks = case.model.transformer_lens_hooks(everything, bridge)
    with torch.no_grad():
        plain, found = bridge(TEXTS), bridge.run_with_hooks(TEXTS, fwd_hooks=hooks)
        again = bridge(TEXTS)
    torch.testing.assert_close(plain, case.logits(TEXTS), atol=ROUNDING * 10, rtol=0)
    torch.testing.assert_close(found, case.logits(TEXTS, everything), atol=ROUNDING * 10, rtol=0)
    assert (found - plain).abs().max() > 0.05
    assert torch.equal(again, plain)


def test_a_baked_checkpoint_computes_what_the_hooks_do(
    case: Case, ablation: Edit, make_direction: Callable[..., Direction], tmp_path: Path
) -> None:
    source = case.loud.save(tmp_path / "source", torch.float64)
    everywhere = Edit(ablate=ablation.ablate, strength=0.7)
    adds = Edit(ablate=everywhere.ablate, blocks=(1, 2), add=((make_direction("c", seed=9), -0.5),))
    for n, edit in enumerate((everywhere, adds)):
        out = tmp_path / str(n)
        if edit.add and case.name not in CONSTANTS:
            with pytest.raises(UnsupportedError, match=r"norm between its MLPs|biases in its MLPs"):
                bake(source, out, edit)
            continue
        bake(source, out, edit)
        with case.model.edited(edit), torch.no_grad():
            live = case.model.hf(TEXTS).logits
        baked = load_plain(out)
        with torch.no_grad():
            torch.testing.assert_close(baked(TEXTS).logits, live, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(case.logits(TEXTS, edit), live, atol=ROUNDING, rtol=0)
        assert (live - case.logits(TEXTS)).abs().max() > 0.05


def test_an_adapter_computes_what_the_hooks_do(case: Case, ablation: Edit, tmp_path: Path) -> None:
    from peft import PeftModel

    if case.name == "gpt-oss":
        with pytest.raises(UnsupportedError, match="peft changes the bias"):
            bake(case.place, tmp_path / "adapter", ablation, "adapter")
        return
    bake(case.place, tmp_path / "adapter", ablation, "adapter")
    with case.model.edited(ablation), torch.no_grad():
        live = case.model.hf(TEXTS).logits
    adapted = PeftModel.from_pretrained(load_plain(case.place), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(TEXTS).logits, live, atol=ROUNDING * 10, rtol=0)
    assert (live - case.logits(TEXTS)).abs().max() > 0.05
