"""Tiny random models of any causal language model class of transformers, on which its anatomy can be proved.

`tiny_config` shrinks a config: sizes become small and differ from one another, so that the shape of a tensor says which
axis is which, and blocks are left out until each kind of block is there about once. Which kinds there are is read from
the model itself, built without memory on the meta device. All else stays: flags, multipliers, softcaps, ties.
`tiny_model` builds such a config with random weights that are loud enough for every part to be heard.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from steer.errors import UnsupportedError
from steer.files import one_line

WIDTH, HEADS, VOCAB = 64, 4, 61
IDS = range(3, VOCAB - 1)
"""Token ids that are text in every tiny model: the ones below are special, the last stands for images and sounds."""
_SMALL, _BLOCKS, _LARGE = 3_000_000, 8, 30_000_000
"""Most parameters and blocks of a config that is used as it is; most parameters of a tiny model."""
_LEAST_BLOCKS = 3


class Unbuildable(UnsupportedError):
    """transformers cannot build a tiny model of a class, or its forward pass fails."""


class Double(TorchFunctionMode):
    """Inside of it every tensor that would be float32, bfloat16 or float16 is float64.

    Forward passes cast to float32 where bfloat16 is too coarse; in float64 that would be the coarsest step.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {name: _double(value) for name, value in (kwargs or {}).items()}
        if func in (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half):
            func = torch.Tensor.double
        if func is torch.full and isinstance(args[1] if len(args) > 1 else kwargs.get("fill_value"), float):
            kwargs.setdefault("dtype", torch.float64)  # the least number of float64 fits in no other
        result = func(*map(_double, args), **kwargs)
        # Without a dtype, torch.ones and others give the default one.
        return result.double() if isinstance(result, Tensor) and result.dtype in _LOW else result


_LOW = (torch.float32, torch.bfloat16, torch.float16)


def _double(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _LOW else argument


@contextmanager
def tiny_world() -> Iterator[None]:
    """While inside, tiny models compute in float64 and without gradients, and transformers says nothing of them."""
    log, before = transformers.logging, torch.get_default_dtype()
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), Double(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `config.architectures` names first, or without one the class for generation of its model_type;
    None if transformers has none."""
    names = config.architectures
    if isinstance(names, list) and names:
        candidates = [getattr(transformers, str(names[0]), None)]
    else:
        mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        candidates = [mapping.get(type(config), None) for mapping in mappings]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, PreTrainedModel)), None)


def own_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that the class takes: the text part of it where the class is the text model of a wrapper."""
    text, expected = config.get_text_config(), model_class.config_class
    return text if expected and not isinstance(config, expected) and isinstance(text, expected) else config


def tiny_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """A config of the same class with small sizes and few blocks, every kind of block among them.

    A config that is small is returned as a copy.

    Errors: Unbuildable if no small config of the class can be built and run.
    """
    config = own_config(config, model_class)
    first: Exception | None = None
    for attempt in _attempts(config, model_class):
        try:
            made = attempt()
            _run(tiny_model(made, model_class))
            return made
        except Exception as error:  # whatever the code of any class raises
            first = first or error
    raise Unbuildable(
        f"{model_class.__name__}: no tiny model can be built and run: {type(first).__name__}: {one_line(str(first))}"
    ) from first


def tiny_model(config: PreTrainedConfig, model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A random model of `config` in float64, for inference, with eager attention and experts.

    Weights have deviation 0.25, less where more than 64 numbers are summed; gains of norms are 0.5 to 1.5, biases about
    0.1. Parameters of state spaces and the router's corrections keep the values that the class gives them.

    Errors: Unbuildable if the model has over 30 million parameters.
    """
    size = sum(p.numel() for p in on_meta(config, model_class).parameters())
    if size > _LARGE:
        raise Unbuildable(f"{model_class.__name__}: the smallest config has {size:.1e} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config, model_class).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _turn_up(name, parameter)
    return model


_OWN = re.compile(r"(^|[._])(A_log|A|D|dt_bias|\w*correction_bias|expert_bias)$")
"""Parameters with a meaning that random values would break: rates of state spaces, corrections of routers."""


def _turn_up(name: str, parameter: nn.Parameter) -> None:
    """Fill a parameter with loud random values."""
    if _OWN.search(name) or not parameter.is_floating_point():
        return
    if name.endswith("bias"):
        parameter.add_(0.1 * torch.randn_like(parameter))
    elif parameter.numel() == max(parameter.shape, default=1):  # a gain of a norm, stored as 1 or as 0
        parameter.add_(torch.rand_like(parameter) - 0.5)
    else:
        parameter.copy_(torch.randn_like(parameter) * 0.25 * min(1.0, (WIDTH / parameter.shape[-1]) ** 0.5))


def _build(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    # A copy: transformers writes the dtype and the attention into the config.
    return model_class._from_config(
        copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def on_meta(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        return _build(config, model_class)


def _run(model: PreTrainedModel) -> None:
    """Raise an error unless a forward pass gives finite logits."""
    ids = torch.randint(IDS.start, IDS.stop, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Double():
        logits = model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite")


# --- sizes ---


def _sizes(size: int, *keys: str) -> dict[str, int]:
    return dict.fromkeys(keys, size)


_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    "depth",
)  # fmt: skip
_HEAD_WIDTHS = ("head_dim", "d_head", "dim_head", "swa_head_dim", "kv_channels")
_SIZES: dict[str, int] = {
    **_sizes(WIDTH, "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim"),
    **_sizes(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    **_sizes(HEADS, "num_decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"),
    **_sizes(2, "num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    **_sizes(2, "swa_num_key_value_heads"),
    **_sizes(24, *_HEAD_WIDTHS),
    **_sizes(40, "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size"),
    **_sizes(40, "d_ff", "dim_ff", "dff", "d_inner", "feed_forward_size", "intermediate_size_mlp"),
    **_sizes(44, "dense_intermediate_size", "prefix_dense_intermediate_size"),
    **_sizes(20, "moe_intermediate_size", "expert_ffn_hidden_size"),
    **_sizes(28, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    **_sizes(VOCAB, "vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "shape_vocab_size"),
    **_sizes(VOCAB, "pronunciation_vocab_size"),
    **_sizes(72, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
    **_sizes(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_sizes(2, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk", "top_k_experts"),
    **_sizes(2, "n_group", "n_groups", "mamba_n_groups", "mamba_ngroups"),
    **_sizes(1, "topk_group"),
    **_sizes(18, "q_lora_rank"),
    **_sizes(22, "kv_lora_rank"),
    **_sizes(12, "qk_nope_head_dim"),
    **_sizes(8, "qk_rope_head_dim", "rotary_dim"),
    **_sizes(14, "v_head_dim"),
    **_sizes(2, "linear_num_key_heads"),
    **_sizes(4, "linear_num_value_heads", "linear_num_heads"),
    **_sizes(8, "linear_key_head_dim", "linear_head_dim"),
    **_sizes(14, "linear_value_head_dim"),
    **_sizes(4, "mamba_n_heads", "mamba_num_heads"),
    **_sizes(2, "n_mamba_heads"),
    **_sizes(24, "mamba_d_head", "mamba_head_dim"),
    **_sizes(6, "mamba_d_state", "ssm_state_size", "state_size"),
    **_sizes(5, "mamba_dt_rank", "time_step_rank"),
    **_sizes(2 * WIDTH, "mamba_d_ssm"),
    **_sizes(8, "sliding_window", "attention_window_size", "sliding_window_size", "window_size", "local_attention"),
    **_sizes(8, "attention_chunk_size", "mamba_chunk_size", "chunk_size"),
    **_sizes(8, "hidden_size_per_layer_input", "laurel_rank", "adapter_rank"),
    **_sizes(16, "index_n_heads"),  # sums of few ReLUs are often 0, and a choice among equal ones depends on padding
    **_sizes(10, "index_head_dim"),
    **_sizes(4, "index_topk"),
}
"""Small sizes by key: residual width, heads times head width, MLPs, vocabulary and positions all differ."""

_FOLLOW = ("embedding_size", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width")
"""Widths that are the residual width in a config where they equal it, and 56 elsewhere."""

_SAME = {
    "num_key_value_heads": ("num_attention_heads",),
    "swa_num_key_value_heads": ("swa_num_attention_heads",),
    "linear_num_key_heads": ("linear_num_value_heads",),
    "head_dim": ("qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
}
"""Sizes that stay equal to another where the config has them equal."""

_SQUARE = _sizes(WIDTH // HEADS, *_HEAD_WIDTHS)
"""Sizes of heads that together are as wide as the residual stream."""
_NEVER_ABSENT = ("head_dim", "n_inner")
"""Sizes where None stands for one that is computed."""
_TOWER = _sizes(32, "hidden_size", "d_model", "embed_dim") | _sizes(8, "head_dim")
"""Sizes of encoders of images and sounds, which are built and never run."""
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BIG = 64
"""An integer from here on may be a size."""


def _attempts(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Ways to make a tiny config, the most faithful first."""
    if _is_small(config, model_class):
        yield lambda: copy.deepcopy(config)
    sections = copy.deepcopy(config)
    if isinstance(rope := getattr(sections.get_text_config(), "rope_parameters", None), dict):
        rope.setdefault("mrope_section", [16, 24, 24])  # classes that need it have it for wide heads alone
    for whole, square in ((config, False), (config, True), (sections, False), (sections, True)):
        yield lambda c=whole, square=square: _fewer_blocks(c, _shrunk(c, square=square), model_class)


def _is_small(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    text = config.get_text_config()
    depth, width, vocab = (getattr(text, k, None) or 0 for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if depth > _BLOCKS or width * vocab > _SMALL:
        return False
    try:
        return sum(p.numel() for p in on_meta(config, model_class).parameters()) < _SMALL
    except Exception:  # an incomplete config; what is wrong is reported if shrinking it fails too
        return False


def _shrunk(
    config: PreTrainedConfig, *, square: bool, more: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """The config's keys with small sizes, with as many blocks as before.

    `square`: heads times their width are the residual width. `more`: sizes that come before `_SIZES`.
    """
    private = ("quantization_config", "output_attentions")
    before = {k: v for k, v in config.to_dict().items() if k not in private and not k.startswith("_")}
    fields = type(config).__dataclass_fields__
    sizes = {**_SIZES, **(_SQUARE if square else {}), **more}
    out: dict[str, Any] = {}
    for key, value in before.items():
        part = vars(config).get(key)
        if isinstance(part, PreTrainedConfig):
            tower = part is not config.get_text_config() and (more or any(k in value for k in _DEPTHS))
            out[key] = _shrunk(part, square=square, more=_TOWER if tower else {})
        elif type(value) is int and key not in fields and (key in sizes or value >= _BIG):
            pass  # the class computed it, and will again
        elif key in sizes:
            out[key] = _resized(value, sizes[key], key in _NEVER_ABSENT)
        elif isinstance(value, dict) and key == "per_layer_config":
            out[key] = {i: {k: _in_ratio(k, v, before, sizes) for k, v in block.items()} for i, block in value.items()}
        elif key in _FOLLOW:
            out[key] = value and (WIDTH if value == before.get("hidden_size") else 56)
        elif key.endswith(("_token_id", "_token_index")):
            out[key] = value if value is None else _ENDS.get(key, IDS.stop)
        elif type(value) is int and value >= _BIG and key in fields and fields[key].default is None:
            out[key] = None  # the same, of a declared key
        else:
            out[key] = value
    tiny = out
    if out.get("qk_nope_head_dim") and out.get("qk_rope_head_dim"):
        tiny = {"qk_head_dim": out["qk_nope_head_dim"] + out["qk_rope_head_dim"]} | out
    for key, others in _SAME.items():
        equal = [other for other in others if before.get(key) is not None and before.get(key) == before.get(other)]
        if equal:
            out[key] = tiny[equal[0]]
    for rule in _RULES:
        rule(before, out)
    return _cut(out, max(_depths(out)), [0]) if more and _depths(out) else out


def _resized(value: Any, size: int, fill: bool) -> Any:
    """`size` for a size; lists keep which of their entries are equal; None and 0 stay, for they mean absence."""
    if isinstance(value, (list, tuple)):
        ranks = sorted({v for v in value if v})
        return [size * (1 + ranks.index(v)) if v else v for v in value]
    if value is None:
        return size if fill else None
    return min(size, value) if type(value) is int else value


def _in_ratio(key: str, value: Any, whole: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """A block's own size, as many times the tiny model's as it was of the whole model's."""
    return max(1, sizes[key] * value // whole[key]) if key in sizes and type(whole.get(key)) is int else value


def _heads_of_mamba(before: Mapping[str, Any], out: dict[str, Any]) -> None:
    """Mamba 2: the heads share the expanded width."""
    for heads, width, expand in (
        ("num_heads", "head_dim", "expand"),
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ):
        if out.get(heads) and out.get(width) and out.get(expand):
            out[width] = (out.get("mamba_d_ssm") or int(out[expand] * WIDTH)) // out[heads]


def _rotary(before: Mapping[str, Any], out: dict[str, Any]) -> None:
    """RoPE's lists have one entry per pair of rotated numbers."""
    rope = out.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    out["rope_parameters"] = rope = copy.deepcopy(rope)
    for one in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if out.get("qk_nope_head_dim") and one.get("partial_rotary_factor") == _rotated(before):
            one["partial_rotary_factor"] = _rotated(out)
        width = out.get("qk_rope_head_dim") or out.get("head_dim") or WIDTH // HEADS
        pairs = int(width * (one.get("partial_rotary_factor") or out.get("partial_rotary_factor") or 1)) // 2
        for key in ("long_factor", "short_factor"):
            if one.get(key):
                one[key] = one[key][:pairs]
        if section := one.get("mrope_section"):
            shares = [n * pairs // sum(section) for n in section]
            one["mrope_section"] = [shares[0] + pairs - sum(shares), *shares[1:]]


def _rotated(keys: Mapping[str, Any]) -> float:
    """The share of a query that multi-head latent attention rotates."""
    return keys["qk_rope_head_dim"] / (keys["qk_nope_head_dim"] + keys["qk_rope_head_dim"])


def _gpt_neo(before: Mapping[str, Any], out: dict[str, Any]) -> None:
    """GPT-Neo's list of kinds is computed from another."""
    if "attention_types" in out and isinstance(out.get("attention_layers"), list):
        out["attention_types"] = [[[kind], 1] for kind in out["attention_layers"]]


_RULES = (_heads_of_mamba, _rotary)


# --- blocks ---


def _fewer_blocks(
    config: PreTrainedConfig, shrunk: dict[str, Any], model_class: type[PreTrainedModel]
) -> PreTrainedConfig:
    """The config of the keys `shrunk`, with the fewest blocks, at least three, that show every kind of block.

    Either the first block of each kind is kept, with all lists cut to those blocks, or where kinds come by a period the
    first blocks up to the one that shows the last kind. Both are built without memory and looked at.
    """
    text = next((k for k in type(config).sub_configs if getattr(config, k, None) is config.get_text_config()), None)
    keys = shrunk[text] if text else shrunk
    whole = type(config).from_dict(copy.deepcopy(shrunk))
    stacks = _stacks(
        on_meta(whole, model_class), {getattr(whole.get_text_config(), "num_hidden_layers", None), *_depths(keys)}
    )
    depth = len(next(iter(stacks.values()), ()))
    if depth <= _LEAST_BLOCKS:
        return whole
    lists = [k for k, v in keys.items() if isinstance(v, (list, tuple)) and len(v) == depth]
    kinds = _kinds(stacks.values(), keys, lists)
    error: Exception | None = None
    for keep in _cuts(kinds):
        few = _cut(keys, depth, keep)
        try:
            made = type(config).from_dict(copy.deepcopy(shrunk | {text: few} if text else few))
            model = on_meta(made, model_class)
            found = _kinds([model.get_submodule(name) for name in stacks], few, lists)
        except Exception as failed:  # a class may refuse the order, or miss a block that others share
            error = failed
            continue
        if set(found) == set(kinds) and len(found) == len(keep):
            return made
    raise ValueError(f"no choice of the {depth} blocks shows all {len(set(kinds))} kinds of block") from error


def _cuts(kinds: Sequence[Any]) -> Iterator[list[int]]:
    """Blocks to keep: the first of each kind, or two where one alone cannot stand; or, where kinds come by a period,
    all up to the last of these. Few blocks come first."""
    cuts: list[list[int]] = []
    for times in (1, 2):
        first = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < times]
        others = [i for i in range(len(kinds)) if i not in first]
        cuts.append(sorted(first + others[: max(0, _LEAST_BLOCKS - len(first))]))
        cuts.append(list(range(max(_LEAST_BLOCKS, first[-1] + 1))))
    yield from sorted(cuts, key=len)


def _cut(keys: dict[str, Any], depth: int, keep: Sequence[int]) -> dict[str, Any]:
    """The keys of a config of `depth` blocks with the blocks `keep` alone."""
    out = dict(keys)
    for key, value in keys.items():
        if key in _DEPTHS and type(value) is int:
            out[key] = max(1, value * len(keep) // depth)
        elif key in _AT_THE_START and type(value) is int:
            out[key] = sum(i < value for i in keep)
        elif key in _AT_THE_END and type(value) is int:
            out[key] = sum(i >= depth - value for i in keep)
        elif key == "per_layer_config":
            out[key] = {str(keep.index(int(i))): block for i, block in value.items() if int(i) in keep}
        elif isinstance(value, (list, tuple)) and _are_numbers_of_blocks(value, depth):
            out[key] = [keep.index(i) for i in value if i in keep]
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            out[key] = [value[i] for i in keep]
    _gpt_neo(keys, out)
    return out


def _are_numbers_of_blocks(value: Sequence[Any], depth: int) -> bool:
    return (
        bool(value) and all(type(v) is int and 0 <= v < depth for v in value) and all(a < b for a, b in pairwise(value))
    )


_AT_THE_START = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_AT_THE_END = ("num_kv_shared_layers",)
"""Keys that count blocks."""


def _depths(keys: Mapping[str, Any]) -> list[int]:
    return [n for k in _DEPTHS if type(n := keys.get(k)) is int]


def _stacks(model: nn.Module, depths: Collection[int | None]) -> dict[str, nn.ModuleList]:
    """The model's lists of blocks by name: the longest whose length is one of `depths`."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    depth = max((len(stack) for stack in found.values() if len(stack) in depths), default=None)
    return {name: stack for name, stack in found.items() if len(stack) == depth}


def _kinds(stacks: Iterable[Any], keys: Mapping[str, Any], lists: Sequence[str]) -> list[tuple]:
    """What distinguishes each block: its modules with their shapes, flags and words, and its entries in lists."""
    columns = [[_signature(block) for block in stack] for stack in stacks]
    depth = len(columns[0])
    columns += [keys[k] for k in lists if not _are_numbers_of_blocks(keys[k], depth)]
    return list(zip(*columns, strict=True))


def _signature(block: nn.Module) -> frozenset[tuple]:
    """The modules of a block; those of a list count once, for it may hold one per block of the model."""
    return frozenset(
        (
            re.sub(r"\d+", "", name),
            type(module).__name__,
            *(tuple(p.shape) for p in module._parameters.values() if p is not None),
            *sorted((k, _flag(v)) for k, v in vars(module).items() if not k.startswith("_")),
        )
        for name, module in block.named_modules()
    )


def _flag(value: Any) -> str:
    """A flag or a word without numbers; of all else the type, for a block's number is no kind."""
    return re.sub(r"\d+", "", str(value)) if isinstance(value, (bool, str)) else type(value).__name__
