"""The names that each architecture gives to the parts of the residual stream: one declared table, nothing guessed.

Names on disk are those of published checkpoints. Where transformers names the parts of the running model differently
(stacked experts, GPT-NeoX's head), both names are listed. `anatomy` applies the table to a checkpoint. Imports no
torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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


def linear(module: str, axis: int = 0) -> Part:
    """The part for a module that is a Linear, or with `axis=1` a Conv1D."""
    return Part(f"{module}.weight", axis, f"{module}.bias")


_ATTENTION, _MLP = linear("self_attn.o_proj"), linear("mlp.down_proj")


@dataclass(frozen=True)
class Layout:
    """The names that an architecture gives to its parts."""

    model_type: str
    base: str = "model."
    """Prefix of the decoder's tensor names."""
    bare: bool = False
    """Whether some checkpoints leave out `base`."""
    block: str = "layers.{}"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Modules whose rows are summed to begin the residual stream; the token embedding comes first."""
    embedding_output: str = "embed_tokens"
    """Live module whose output is that sum."""
    heads: tuple[str, ...] = ("lm_head",)
    """Names of the LM head on disk; a bake that adds a head uses the first."""
    head_module: str = "lm_head"
    """Live module that computes the logits."""
    tied: bool = False
    """Whether the head is the embedding if config.json does not say."""
    attention: Part = _ATTENTION
    mlp: tuple[tuple[Part, ...], ...] = ((_MLP,),)
    """Forms of a block's MLP on disk, each with all its writers; a block has exactly one form."""
    attention_norm: str | None = None
    """RMSNorm between the attention's writer and the residual stream; None without one. In most architectures a norm of
    the same name lies before the MLP instead."""
    mlp_norm: str | None = None
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

    @property
    def attention_module(self) -> str:
        """Live module, below the block, whose output is what the attention writes, before a norm if there is one."""
        return self.attention.weight.removesuffix(".weight")

    @property
    def mlp_module(self) -> str:
        """The same for the MLP. Experts write together, as the output of the whole MLP."""
        return "mlp" if self.experts_keys else self.mlp[0][0].weight.removesuffix(".weight")


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
_EXPERTS = Part("mlp.experts.{}.down_proj.weight")
_SHARED = linear("mlp.shared_expert.down_proj")
_NUMBERS = ("num_experts", "num_local_experts")
_POST_ATTENTION, _POST_MLP = "post_attention_layernorm", "post_feedforward_layernorm"

LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Layout("mistral"),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    "Phi3ForCausalLM": Layout("phi3"),
    # Gemma multiplies the embedding's output by sqrt(d), which leaves directions as they are.
    "Gemma2ForCausalLM": Layout(
        "gemma2", tied=True, attention_norm=_POST_ATTENTION, mlp_norm=_POST_MLP, gain_offset=1.0, softcap_or_sinks=True
    ),
    "Gemma3ForCausalLM": Layout(
        "gemma3_text", tied=True, attention_norm=_POST_ATTENTION, mlp_norm=_POST_MLP, gain_offset=1.0
    ),
    "Olmo2ForCausalLM": Layout("olmo2", attention_norm=_POST_ATTENTION, mlp_norm=_POST_MLP),
    "GPT2LMHeadModel": Layout(
        "gpt2",
        base="transformer.",
        bare=True,
        block="h.{}",
        embeddings=("wte", "wpe"),  # positions are written into the stream too
        embedding_output="drop",
        tied=True,
        attention=linear("attn.c_proj", axis=1),
        mlp=((linear("mlp.c_proj", axis=1),),),
        final_norm="ln_f",
        centred=True,
        mlp_bias="always",
    ),
    # With the parallel residual, attention and MLP read the same stream; both outputs are still added to it.
    "GPTNeoXForCausalLM": Layout(
        "gpt_neox",
        base="gpt_neox.",
        embeddings=("embed_in",),
        embedding_output="embed_in",
        heads=("embed_out", "lm_head"),
        attention=linear("attention.dense"),
        mlp=((linear("mlp.dense_4h_to_h"),),),
        final_norm="final_layer_norm",
        centred=True,
        mlp_bias="always",
    ),
    "MixtralForCausalLM": Layout(
        "mixtral",
        mlp=((Part("block_sparse_moe.experts.{}.w2.weight"),), (_STACKED,)),
        experts_keys=("num_local_experts",),
    ),
    # A gate scales the shared expert's output, as routing weights scale the others'. Scaling does not change
    # directions.
    "Qwen2MoeForCausalLM": Layout(
        "qwen2_moe", mlp=((_EXPERTS, _SHARED), (_STACKED, _SHARED), (_MLP,)), experts_keys=_NUMBERS
    ),
    # Some blocks may be dense.
    "Qwen3MoeForCausalLM": Layout("qwen3_moe", mlp=((_EXPERTS,), (_STACKED,), (_MLP,)), experts_keys=_NUMBERS),
    # A token's routing weights sum to 1, so a constant in every expert's bias is that constant in the stream.
    "GptOssForCausalLM": Layout(
        "gpt_oss",
        mlp=((Part("mlp.experts.down_proj", axis=2, bias="mlp.experts.down_proj_bias", stacked=True),),),
        mlp_bias="always",
        softcap_or_sinks=True,
        experts_keys=("num_local_experts", "num_experts"),
    ),
}
"""Layouts by the architecture's name in config.json, under `architectures`."""
