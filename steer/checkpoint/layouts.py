"""The names that an architecture gives to the parts of the residual stream, and those declared for some of them.

Names on disk are those of published checkpoints. Where transformers names the parts of the running model differently
(stacked experts, GPT-NeoX's head), both names are listed. `anatomy` applies the table to a checkpoint. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

BlockKind = Literal["attention", "mlp"]
"""What a block's writer belongs to: attention or another mixer of tokens, or the MLP."""


@dataclass(frozen=True)
class Part:
    """A weight of a block that writes into the residual stream, or such a weight for each expert."""

    weight: str
    """Its name below the block; `{}` stands for an expert's number."""
    axis: int = 0
    """Axis that faces the residual stream: 0 for a Linear `[out, in]`, 1 for a Conv1D `[in, out]`; for all experts in
    one tensor, 1 for `[experts, out, in]` and 2 for `[experts, in, out]`. Where in = out the shape does not show
    which."""
    bias: str | None = None
    """Name of its bias, `[d]` or `[experts, d]`; a checkpoint may lack it. None: it never has one."""
    stacked: bool = False
    """Whether one tensor holds all experts, `[experts, ...]`."""
    adaptable: bool = True
    """Whether peft can change it. It takes experts `[in, out]` for `[out, in]` where no flag says otherwise."""
    live: str | None = None
    """The live parameter below the block, where it has another name: one for all experts, if they are stored one by
    one."""


def linear(module: str, axis: int = 0) -> Part:
    """The part for a module that is a Linear, or with `axis=1` a Conv1D."""
    return Part(f"{module}.weight", axis, f"{module}.bias")


@dataclass(frozen=True)
class Addend:
    """One of the vectors that a block adds to the residual stream, and the weights that compute it."""

    kind: BlockKind
    module: str
    """Live module below the block whose output it is, before the norms and the scale. Experts write together, as the
    output of the whole MLP."""
    forms: tuple[tuple[Part, ...], ...]
    """Forms of its writers on disk, each with all of them; a block holds exactly one form."""
    norms: tuple[str, ...] = ()
    """RMSNorms between the module and the residual stream, the one before the residual stream first. More than one
    where a norm is given a sum of normed vectors."""
    stored_norms: tuple[str, ...] = ()
    """Their names on disk, if those are others."""
    scale: float = 1.0
    """Number by which the model multiplies it on its way into the residual stream."""
    given: bool = False
    """Whether it is what `module` is given, not what it puts out: of experts that see a list of tokens without the
    texts, the norm behind them."""

    @property
    def parts(self) -> Iterator[Part]:
        """The writers of all forms."""
        return (part for form in self.forms for part in form)

    @property
    def experts(self) -> bool:
        """Whether experts compute it, in blocks that are not dense."""
        return any(part.stacked or "{}" in part.weight for part in self.parts)


_ATTENTION, _MLP = linear("self_attn.o_proj"), linear("mlp.down_proj")


def attention_and_mlp(
    attention: Part = _ATTENTION,
    mlp: tuple[tuple[Part, ...], ...] = ((_MLP,),),
    norms: tuple[str, ...] = (),
) -> tuple[Addend, Addend]:
    """What a block of attention and an MLP adds; `norms` lie between them and the residual stream. In most
    architectures a norm of the same name lies before the MLP instead."""
    first = Addend("attention", attention.weight.removesuffix(".weight"), ((attention,),), norms[:1])
    second = Addend("mlp", mlp[0][0].weight.removesuffix(".weight"), mlp, norms[1:])
    return first, replace(second, module="mlp") if second.experts else second


@dataclass(frozen=True)
class Layout:
    """The names that an architecture gives to its parts."""

    model_type: str
    base: str = "model."
    """Prefix of the paths of the decoder's live modules."""
    bases: tuple[str, ...] = ()
    """Prefixes of the decoder's tensor names on disk, where they are not `base`."""
    block: str = "layers.{}"
    blocks: tuple[tuple[Addend, ...], ...] = (attention_and_mlp(),)
    """The kinds of blocks, each with the modules that add to the residual stream."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Modules whose rows are summed to begin the residual stream; the token embedding comes first."""
    embedding_output: str | None = "embed_tokens"
    """Live module whose output is that sum, or a multiple of it; None where no module puts it out."""
    heads: tuple[str, ...] = ("lm_head",)
    """Names of the LM head on disk; a bake that adds a head uses the first."""
    head_module: str = "lm_head"
    """Live module that computes the logits."""
    tied: bool = False
    """Whether the head is the embedding if config.json does not say."""
    gain_offset: float = 0.0
    """Number added to a norm's stored weight to get its gain."""
    softcap_or_sinks: bool = False
    """Whether attention does more with its scores than scale, mask and softmax: a softcap, which transformers' `sdpa`
    silently leaves out, or sinks, which it refuses."""
    final_norm: str = "norm"
    """Live module, below the decoder, between the last block and the LM head."""
    centred: bool = False
    """Whether that norm, and the blocks' norms, subtract the mean first (LayerNorm)."""
    mlp_bias: str | None = None
    """Config key that gives all MLPs of the model biases, or `always`; None if MLPs have none."""
    experts_keys: tuple[str, ...] = ()
    """Config keys that may hold the number of experts; empty for an architecture without."""
    names: tuple[str, ...] = ()
    """Patterns of all tensor names on disk, `{}` for numbers, those of a block below the block and the others below the
    decoder, where a proof has listed them."""

    @property
    def addends(self) -> Iterator[Addend]:
        """What blocks of all kinds add."""
        return (addend for kind in self.blocks for addend in kind)

    @property
    def has_experts(self) -> bool:
        """Whether some blocks have experts."""
        return any(addend.experts for addend in self.addends)

    @property
    def fan_in_first(self) -> bool:
        """Whether the linear writers are stored `[in, out]`, as Conv1D stores them."""
        return any(part.axis == 1 and not part.stacked for addend in self.addends for part in addend.parts)


@dataclass(frozen=True)
class Structure:
    """The anatomy of one config, as a proof finds it: the names, and what sizes and flags of the config decide."""

    architecture: str
    """Name of the model's class in transformers."""
    layout: Layout
    blocks: int
    kinds: tuple[int, ...]
    """For each block, its kind in `layout.blocks`; empty if there is one kind only."""
    width: int
    """Width of the residual stream."""
    vocab: int
    """Number of logits of the LM head."""
    experts: int
    """Number of experts in each MLP that has any; 0 if none has."""
    biased: bool
    """Whether the MLPs have biases already."""
    tied: bool
    """Whether LM head and embedding are the same tensor."""
    logit_softcap: float | None
    """Bound `c` on the logits, `c * tanh(logits / c)`; None without one."""
    logit_scale: float
    """Number by which the model multiplies what the LM head puts out, before the bound."""

    def addends(self, block: int) -> tuple[Addend, ...]:
        """What a block adds to the residual stream."""
        return self.layout.blocks[self.kinds[block] if self.kinds else 0]


READERS = re.compile(
    r"""(
    (input | post_attention | pre_feedforward)_layernorm | ln_[12]
    | self_attn \. ([qkv]_proj | qkv_proj | [qk]_norm | sinks | rotary_emb\.inv_freq)
    | attn \. (c_attn | bias | masked_bias)
    | attention \. (query_key_value | bias | masked_bias | rotary_emb\.inv_freq)
    | mlp \. ((gate | up | gate_up)_proj | c_fc | dense_h_to_4h | gate | router)
    | mlp \. experts \. (\d+\.(gate | up)_proj | gate_up_proj | gate_up_proj_bias)
    | mlp \. (shared_expert\.(gate | up)_proj | shared_expert_gate)
    | block_sparse_moe \. (gate | experts\.\d+\.w[13])
    )(\.weight | \.bias)?""",
    re.VERBOSE,
)
"""Tensors of a block, by their names below it, that write nothing into the residual stream in any architecture: the
weights that read from it, the norms before or inside attention and MLP, and the buffers of old checkpoints."""

_STACKED = Part("mlp.experts.down_proj", axis=1, stacked=True)
"""Experts in one tensor, as transformers 5 holds them in the running model. It saves them separately; other programs
save them like this."""
_EXPERTS = Part("mlp.experts.{}.down_proj.weight", live=_STACKED.weight)
_SHARED = linear("mlp.shared_expert.down_proj")
_NUMBERS = ("num_experts", "num_local_experts")
_BETWEEN = (attention_and_mlp(norms=("post_attention_layernorm", "post_feedforward_layernorm")),)

LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Layout("mistral"),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    "Phi3ForCausalLM": Layout("phi3"),
    # Gemma multiplies the embedding's output by sqrt(d), which leaves directions as they are.
    "Gemma2ForCausalLM": Layout("gemma2", tied=True, blocks=_BETWEEN, gain_offset=1.0, softcap_or_sinks=True),
    "Gemma3ForCausalLM": Layout("gemma3_text", tied=True, blocks=_BETWEEN, gain_offset=1.0),
    "Olmo2ForCausalLM": Layout("olmo2", blocks=_BETWEEN),
    "GPT2LMHeadModel": Layout(
        "gpt2",
        base="transformer.",
        block="h.{}",
        blocks=(attention_and_mlp(linear("attn.c_proj", axis=1), ((linear("mlp.c_proj", axis=1),),)),),
        embeddings=("wte", "wpe"),  # positions are written into the stream too
        embedding_output="drop",
        tied=True,
        final_norm="ln_f",
        centred=True,
        mlp_bias="always",
    ),
    # With the parallel residual, attention and MLP read the same stream; both outputs are still added to it.
    "GPTNeoXForCausalLM": Layout(
        "gpt_neox",
        base="gpt_neox.",
        blocks=(attention_and_mlp(linear("attention.dense"), ((linear("mlp.dense_4h_to_h"),),)),),
        embeddings=("embed_in",),
        embedding_output="embed_in",
        heads=("embed_out", "lm_head"),
        final_norm="final_layer_norm",
        centred=True,
        mlp_bias="always",
    ),
    "MixtralForCausalLM": Layout(
        "mixtral",
        blocks=(
            attention_and_mlp(
                mlp=((Part("block_sparse_moe.experts.{}.w2.weight", live=_STACKED.weight),), (_STACKED,))
            ),
        ),
        experts_keys=("num_local_experts",),
    ),
    # A gate scales the shared expert's output, as routing weights scale the others'. Scaling does not change
    # directions.
    "Qwen2MoeForCausalLM": Layout(
        "qwen2_moe",
        blocks=(attention_and_mlp(mlp=((_EXPERTS, _SHARED), (_STACKED, _SHARED), (_MLP,))),),
        experts_keys=_NUMBERS,
    ),
    # Some blocks may be dense.
    "Qwen3MoeForCausalLM": Layout(
        "qwen3_moe", blocks=(attention_and_mlp(mlp=((_EXPERTS,), (_STACKED,), (_MLP,))),), experts_keys=_NUMBERS
    ),
    # A token's routing weights sum to 1, so a constant in every expert's bias is that constant in the stream.
    "GptOssForCausalLM": Layout(
        "gpt_oss",
        blocks=(
            attention_and_mlp(
                mlp=((Part("mlp.experts.down_proj", axis=2, bias="mlp.experts.down_proj_bias", stacked=True),),)
            ),
        ),
        mlp_bias="always",
        softcap_or_sinks=True,
        experts_keys=("num_local_experts", "num_experts"),
    ),
}
"""Layouts by the architecture's name in config.json, under `architectures`. Those of other architectures are found and
proved by `proof`."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The name under `architectures`, else the architecture of the config's `model_type`."""
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    model_type = config.get("model_type")
    return next((a for a, layout in LAYOUTS.items() if layout.model_type == model_type), str(model_type))


def pattern(name: str) -> str:
    """A tensor's name with `{}` for every number in it, such as that of an expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
