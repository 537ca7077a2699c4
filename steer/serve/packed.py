"""Several texts packed into one forward pass: their tokens, their paged KV caches, and the attention over them.

`Batcher` wraps transformers' continuous batching for `steer.serve.batching`, which runs one loop of `next`, `forward`
and `take`. On a CPU, attention is computed here (`packed_attention`), text by text; on a GPU transformers' attention
is used where the architecture allows it.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, GenerationConfig
from transformers.masking_utils import sdpa_mask

from steer.checkpoint.anatomy import Anatomy
from steer.checkpoint.reader import CheckpointFiles
from steer.checkpoint.tiny import model_class_of, on_meta
from steer.core.lists import ranges
from steer.errors import SteerError, UnsupportedError
from steer.files import one_line
from steer.model.attention import attend, check_known, grouped_attention

_log = logging.getLogger(__name__)
SHARE = 0.25
"""Share of the free memory that pages may take on a CPU."""
PAGE = 64
"""Tokens per page on a CPU."""
READ = 256
"""Tokens per step on a CPU. Longer prompts are read in pieces, so that the other texts go on in between."""
_WRITTEN_FOR = "5.19"
_OFF_BY = 0.25
"""Largest distance of packed logits from plain ones, as a share of the distance between the logits of two texts. On the
default merge, rounding to bf16 gives 0.06, and texts that attend to each other give 0.4."""


@dataclass(frozen=True)
class Part:
    """One text's tokens in a step."""

    id: str
    tokens: slice
    """Their places among the packed tokens."""
    writes: bool
    """Whether the step chooses the text's next token. If not, part of its prompt is still to be read."""


@contextmanager
def _known_names() -> Iterator[None]:
    """Turn errors of a transformers version with other names into an UnsupportedError that names both versions."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, ImportError) as e:
        raise _unsupported(f"{type(e).__name__}: {e}") from e


def check_files(place: str, name: str) -> None:
    """`check_blocks` on a model without weights, from a checkpoint's config.json, before minutes of loading.

    `place`: a directory or a hub id. `name`: what messages call it. A model that needs its weights for the pass, or
    whose config transformers cannot read, is not refused here: loading it says so, or `BatchingEngine` does.
    """
    if not Path(place).is_dir():
        return
    anatomy = Anatomy.of(CheckpointFiles.open(Path(place)).config, name)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        model_class = model_class_of(config)
        if model_class is not None:
            hf: Any = on_meta(config, model_class).eval()
            hf.set_experts_implementation("batched_mm")  # others look which experts were chosen, in numbers
            check_blocks(hf, anatomy)
    except UnsupportedError:
        raise
    except Exception as e:
        _log.debug("%s: not checked before it is loaded: %s", name, one_line(e))


@_known_names()
@torch.inference_mode()
def check_blocks(hf: Any, anatomy: Anatomy) -> None:
    """Check that transformers' pages can hold what every block keeps of a text: keys and values of heads of one size.

    The model reads one token, and the sizes are those in its cache.
    Errors: UnsupportedError that names the other blocks.
    """
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    config = hf.config.get_text_config()
    others: dict[str, list[int]] = {}
    for block, layer_type in enumerate(getattr(config, "layer_types", None) or ()):
        if layer_type not in ATTN_TYPE_TO_ALLOCATOR:
            others.setdefault(layer_type, []).append(block)
    if not others:
        cache = hf(input_ids=torch.tensor([[0]], device=hf.device), use_cache=True).past_key_values
        for block, layer in enumerate(cache.layers):
            heads, key, value = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
            others.setdefault(f"heads x key + value: {heads} x {key} + {value}", []).append(block)
        if len(others) == 1:
            heads, d = find_num_key_value_heads(config), find_head_dim(config)
            if f"heads x key + value: {heads} x {d} + {d}" in others:
                if hf._supports_attention_backend:
                    return
                others = {"an attention that cannot be replaced": list(range(len(cache.layers)))}
    found = "; ".join(f"{what} in {ranges(blocks)}" for what, blocks in others.items())
    raise UnsupportedError(
        f"{anatomy.architecture}: serve expects blocks of full or sliding attention, whose heads all have the size in "
        f"config.json; found blocks with {found}; use chat, find and bake, which work"
    )


class Batcher:
    """Packs texts into steps.

    One thread calls `next`, `forward` and `take` in a loop; `add` and `drop` may be called from any thread. Texts do
    not share cached prefixes, because the cache of a prompt depends on the sliders under which it was read.
    """

    def __init__(self, hf: Any, anatomy: Anatomy, places: int, context: int) -> None:
        """Allocate pages for `places` texts at once, of `context` tokens each if memory allows.

        Errors: SteerError without memory for a page, UnsupportedError for a transformers version that works otherwise.
        """
        self._hf, self._original_attention = hf, hf.config._attn_implementation
        # On a GPU transformers' attention is faster; it is used unless the architecture computes scores in its own way.
        self._packs_attention = hf.device.type == "cpu" or anatomy.layout.softcap_or_sinks
        try:
            # transformers seeds torch's global generators for its own, unused sampling.
            with _known_names(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                self._manager: Any = self._new_manager(places, context)
                self._processor: Any = self._manager.batch_processor
                self._scheduler: Any = self._processor.scheduler
                self._scheduler.read = self._scheduler.most = self._processor.max_batch_tokens
                self._allocators: list[Any] = list(self._processor.cache.cache_allocators.values())
                self.capacity: int = self._processor.cache.num_sectors
                """Total number of pages."""
                # So many that a second text of this length fits beside it.
                pages = self.capacity // min(2, places)
                self.context = bisect_right(range(1, context + 1), pages, key=self.pages)
                """Most tokens of one text."""
        except BaseException:
            self._hf.set_attn_implementation(self._original_attention)
            raise

    def _new_manager(self, places: int, context: int) -> Any:
        from steer.serve.turns import FAIR

        config = transformers.ContinuousBatchingConfig(
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,  # a replayed graph calls no hook
            auto_switch_to_flash=False,  # flash attention would be downloaded
            safety_margin=0.0,  # the caller of `add` makes sure that texts fit
            max_requests_per_batch=places,
            scheduler_type=FAIR,
            **(_pages(self._hf, places, context) if self._hf.device.type == "cpu" else {}),
        )
        if self._packs_attention:
            self._hf.set_attn_implementation("paged|eager")  # a placeholder that every architecture has; it never runs
        elif not self._original_attention.startswith(("flash", "kernels-community")):
            self._hf.set_attn_implementation("sdpa")
        manager = self._hf.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)
        if self._packs_attention:
            # Set after the manager is made, which accepts known attentions only, and before it makes masks.
            self._hf.set_attn_implementation(NAME)
        try:
            manager.warmup()
        except (MemoryError, ValueError) as e:
            raise SteerError(f"no room for the KV cache: {e}; free memory, or serve a smaller context") from e
        return manager

    def pages(self, tokens: int) -> int:
        """Return the most pages, of `capacity`, that a text of `tokens` tokens takes."""
        return sum(math.ceil(a.needs_new_blocks("", 0, tokens) / a.blocks_per_sector) for a in self._allocators)

    @_known_names()
    def add(self, id: str, prompt: Sequence[int], new: int, ends: Sequence[int]) -> None:
        """Add a text to the following steps, until `new` tokens are written or one of the tokens `ends`.

        Together, the added texts may need at most `capacity` pages; then no text is evicted and read again.
        """
        options = {"request_id": id, "max_new_tokens": new, "eos_token_id": list(ends) or -1}
        if self._manager.add_request(list(prompt), **options) is None:
            raise SteerError("transformers' continuous batching takes no more texts")

    def drop(self, id: str) -> None:
        """Remove a text from the following steps."""
        self._manager.cancel_request(id)

    @_known_names()
    def next(self) -> list[Part]:
        """Prepare the next step and return its texts; an empty list if there is nothing to do."""
        if not self._processor.prepare_next_batch():
            return []
        io = self._processor.inputs_and_outputs
        parts, start = [], 0
        for request in io.requests_in_batch:
            tokens = slice(start, start := start + request.query_length)
            parts.append(Part(request.state.request_id, tokens, request.has_new_token))
        self._inputs: dict[str, Any] = dict(io.get_model_kwargs(use_padding=False))
        self.positions: Int[Tensor, "1 tokens"] = self._inputs["position_ids"]
        """Position of each of the step's tokens in its text."""
        self._writes = sum(p.writes for p in parts)
        self._since = time.perf_counter()
        self._inputs["logits_to_keep"] = self._inputs["logits_indices"][: self._writes]
        if self._packs_attention:
            self._inputs |= packing(self._inputs, getattr(self._hf.config.get_text_config(), "sliding_window", None))
        return parts

    def forward(self) -> Float[Tensor, "writes vocab"]:
        """Run the step and return the logits of the texts that write."""
        # With no text that writes, `logits_to_keep` would be empty, and the logits of all tokens would come back.
        inputs = self._inputs if self._writes else self._inputs | {"logits_to_keep": 1}
        return self._hf(**inputs).logits[0][: self._writes]

    @_known_names()
    def take(self, tokens: Sequence[int]) -> None:
        """End the step: append the chosen tokens to the texts that write."""
        self._scheduler.took(time.perf_counter() - self._since)
        output = self._processor.inputs_and_outputs.output_ids
        output[0, : len(tokens)] = torch.tensor(tokens, dtype=output.dtype)
        self._processor.update_batch()
        while self._manager.get_result(timeout=0) is not None:
            pass  # finished replies, which the manager would keep until they are fetched

    @_known_names()
    @torch.inference_mode()
    def check(self) -> None:
        """Write two tokens to each of two short texts, packed, and compare the logits with those of each text alone.

        Errors: UnsupportedError if they differ, and for a transformers version that works otherwise.
        """
        vocab = self._hf.config.get_text_config().vocab_size
        ids = [101 * n % vocab for n in range(2, 11)]
        texts = {"check 1": (ids[:4], ids[7]), "check 2": (ids[4:7], ids[8])}
        alone = {id: [self._alone(text), self._alone([*text, more])] for id, (text, more) in texts.items()}
        apart = sum(float((a - b).norm()) for a, b in zip(*alone.values(), strict=True))
        for id, (text, _) in texts.items():
            self.add(id, text, 2, ())
        off = 0.0
        while parts := self.next():
            for part, logits in zip(parts, self.forward().float(), strict=True):
                off += float((logits - alone[part.id].pop(0)).norm())
            self.take([texts[p.id][1] for p in parts])
        if off > _OFF_BY * 2 * apart:
            raise _unsupported("texts that are packed together get other logits than alone")

    def _alone(self, text: Sequence[int]) -> Float[Tensor, " vocab"]:
        ids = torch.tensor([text], device=self._hf.device)
        return self._hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def close(self) -> None:
        """Free the pages and restore the model's own attention. Further calls do nothing."""
        if self._manager is None:
            return
        self._manager.destroy()
        self._hf.set_attn_implementation(self._original_attention)
        self._manager = self._processor = None
        self._allocators, self._inputs = [], {}


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all blocks."""
    text = config.get_text_config()
    d = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * groups * d * dtype.itemsize * text.num_hidden_layers


def _pages(hf: Any, places: int, context: int) -> dict[str, Any]:
    """Return the page settings for a CPU: pages for `places` texts of `context` tokens, at most SHARE of the memory."""
    wanted = places * math.ceil(context / PAGE)
    fits = int(psutil.virtual_memory().available * SHARE) // (PAGE * cache_bytes(hf.config, hf.dtype))
    return {
        "page_size": PAGE,
        "num_blocks": max(1, min(wanted, fits)),
        "max_batch_tokens": max(READ, places),
        "max_memory_percent": 0.95,
    }


def _unsupported(found: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers {transformers.__version__}: expected the continuous batching of {_WRITTEN_FOR}, "
        f"found another ({found}); install transformers {_WRITTEN_FOR}"
    )


NAME = "steer_packed"
_PAGED = frozenset({
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "is_causal", "logits_indices", "logits_processor_args",
})  # fmt: skip
"""Arguments that transformers passes for a paged cache; `packed_attention` uses `packings` in their place."""


@dataclass(frozen=True)
class Reading:
    """Texts whose new tokens attend to their keys in one call."""

    tokens: Int[Tensor, "texts new"]
    """Places among the packed tokens: all new tokens of one text, or one token for each of several texts."""
    keys: slice
    """Places among the fetched keys. Several texts are padded to one length."""
    mask: Bool[Tensor, "texts 1 new seq"] | None
    """True where a token attends to a key. None: a single new token attends to all keys, several new tokens of one text
    attend causally."""


@dataclass(frozen=True)
class Packing:
    """How the layers of one type, full or sliding attention, read the texts of a step."""

    readings: tuple[Reading, ...]
    order: Int[Tensor, " keys"] | None
    """Index of each key of the readings among the keys that the cache returns; None if the order is the same."""


def packing(inputs: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return model inputs that replace transformers' own: cache indices, an unused mask, and a Packing per layer type.

    `window`: how many keys a token of a sliding layer attends to, including its own.
    """
    fetched: list[Tensor] = inputs["read_index"]
    ends_q = inputs["cu_seq_lens_q"].tolist()
    read, packings = [], {}
    for i, layer_type in enumerate(inputs["cache"].cache_allocators):
        ends_k = inputs["cu_seq_lens_k"][layer_type]
        sliding = layer_type == "sliding_attention"
        readings, order = _readings(ends_q, ends_k.tolist(), fetched[i], window if sliding else None)
        # A sliding layer's index marks the places of the new keys by their order, so that order must not change.
        ordered = order is not None and not sliding
        read.append(fetched[i][order] if ordered else fetched[i])
        packings[layer_type] = Packing(readings, None if ordered else order)
    # transformers passes a mask of four dimensions on unchanged; `packed_attention` ignores it.
    unseen = torch.empty(1, 1, 1, 0, device=fetched[0].device)
    mask = unseen if len(packings) == 1 else dict.fromkeys(packings, unseen)
    return {"read_index": read, "attention_mask": mask, "packings": packings}


def _readings(
    ends_q: list[int], ends_k: list[int], fetched: Int[Tensor, " keys"], window: int | None
) -> tuple[tuple[Reading, ...], Int[Tensor, " keys"] | None]:
    """Return the readings of a step, and the order in which they need the keys; None if it is the cache's order."""
    device = fetched.device
    new = [b - a for a, b in pairwise(ends_q)]
    seq = [b - a for a, b in pairwise(ends_k)]
    readings: list[Reading] = []
    order: list[Tensor] = []
    at = 0
    # If nothing is fetched from the cache, the keys are those of the step itself, text after text.
    singles = [i for i, n in enumerate(new) if n == 1] if fetched.numel() else []
    for group in _of_like_length(singles, seq):
        width = max(seq[i] for i in group)
        lengths = torch.tensor([seq[i] for i in group], device=device)
        places = torch.arange(width, device=device).expand(len(group), -1)
        starts = torch.tensor([ends_k[i] for i in group], device=device)
        order.append((starts[:, None] + torch.minimum(places, lengths[:, None] - 1)).flatten())
        padded = min(seq[i] for i in group) < width
        mask = (places < lengths[:, None])[:, None, None] if padded else None
        tokens = torch.tensor([[ends_q[i]] for i in group], device=device)
        readings.append(Reading(tokens, slice(at, at := at + len(group) * width), mask))
    for i in sorted(set(range(len(new))) - set(singles)):
        order.append(torch.arange(ends_k[i], ends_k[i + 1], device=device))
        mask = None
        if new[i] < seq[i] or (window is not None and new[i] > window):
            # Token i attends to key j where 0 <= i - j < window.
            behind = torch.arange(seq[i] - new[i], seq[i], device=device)[:, None] - torch.arange(seq[i], device=device)
            mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
            mask = mask[None, None]
        tokens = torch.arange(ends_q[i], ends_q[i + 1], device=device)[None]
        readings.append(Reading(tokens, slice(at, at := at + seq[i]), mask))
    return tuple(readings), torch.cat(order) if fetched.numel() else None


def _of_like_length(texts: Sequence[int], seq: Sequence[int]) -> list[list[int]]:
    """Group texts so that the longest in a group is at most twice the shortest, which limits the padding."""
    groups: list[list[int]] = []
    for i in sorted(texts, key=lambda i: -seq[i]):
        if groups and 2 * seq[i] >= seq[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups new d"],
    value: Float[Tensor, "batch groups new d"],
    attention_mask: Float[Tensor, "batch 1 new seq"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    cache: Any = None,
    packings: Mapping[str, Packing] | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "batch new heads d"], None]:
    """Attention with transformers' signature: over packed texts if there is a paged `cache`, else over a plain batch.

    Each text is attended to separately, not in one large matrix whose off-diagonal blocks are masked.
    """
    if cache is None or packings is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, **more)
    check_known(module, {name: value for name, value in more.items() if name not in _PAGED})
    packed = packings[cache.layer_to_allocator[module.layer_idx].layer_type]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=more)
    heads, new, d = query.shape[1:]
    groups = key.shape[1]
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if packed.order is not None:
        keys, values = keys[packed.order], values[packed.order]
    out = query.new_empty(new, heads, d)
    for r in packed.readings:
        q, (texts, count) = queries[r.tokens], r.tokens.shape
        k, v = (x[r.keys].view(texts, -1, groups, d).transpose(1, 2) for x in (keys, values))
        if count == 1 and softcap is None and s_aux is None:
            # Query heads that share keys are treated as queries of one head, so that the keys are read once.
            q = q.view(texts, groups, heads // groups, d)
            read = scaled_dot_product_attention(q, k, v, attn_mask=r.mask, scale=scaling)
            out[r.tokens] = read.reshape(texts, 1, heads, d)
        else:
            out[r.tokens] = attend(q.transpose(1, 2), k, v, r.mask, scaling, softcap, s_aux).transpose(1, 2)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
