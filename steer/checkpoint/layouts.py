"""The names that each architecture gives to the parts of the residual stream: one declared table, nothing guessed.

Names on disk are those of published checkpoints. Where transformers names the parts of the running model differently
(stacked experts, GPT-NeoX's head), both names are listed. `anatomy` applies the table to a checkpoint. Imports no
torch.
"""

from __future__ import annotations

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
    tied: bool = False
    """Whether the head is the embedding if config.json does not say."""
    attention: Part = _ATTENTION
    mlp: tuple[tuple[Part, ...], ...] = ((_MLP,),)
    """Forms of a block's MLP on disk, each with all its writers; a block has exactly one form."""
    attention_module: str = "self_attn.o_proj"
    """Live module, below the block, whose output is what the attention writes, before a norm if there is one."""
    mlp_module: str = "mlp.down_proj"
    attention_norm: str | None = None
    """RMSNorm between the attention's writer and the residual stream; None without one. In most architectures a norm of
    the same name lies before the MLP instead."""
    mlp_norm: str | None = None
    gain_offset: float = 0.0
    """Number added to a norm's stored weight to get its gain."""
    own_scores: bool = False
    """Whether attention does more with its scores than scale, mask and softmax: a softcap, which transformers' `sdpa`
    silently leaves out, or sinks, which it refuses."""
    final_norm: str = "norm"
    """Live module, below the decoder, between the last block and the LM head."""
    centred: bool = False
    """Whether that norm, and the blocks' norms, subtract the mean first (LayerNorm)."""
    head_module: str = "lm_head"
    """Live module that computes the logits."""
    softcap_key: str | None = None
    """Config key of the bound `c` on the logits: `c * tanh(logits / c)`."""
    readers: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
    """Modules and tensors of a block that write nothing into the residual stream; `{}` stands for an expert's number.
    The norms among them lie before the attention, before the MLP, or inside these."""
    constants: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    """Buffers that old checkpoints store, such as rotary frequencies and causal masks."""
    mlp_bias: str | None = None
    """Config key that gives all MLPs of the model biases, or `always`; None if MLPs have none."""
    bias_modules: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    """Modules of a block that get a bias from that config key."""
    blocks_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"
    experts_keys: tuple[str, ...] = ()
    """Config keys that may hold the number of experts."""


_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_READERS = Layout.readers[:-2]  # the projections of a plain block
_GEMMA_READERS = (*_READERS, "input_layernorm", "pre_feedforward_layernorm")
_EXPERTS = "mlp.experts.{}"
_QWEN_EXPERTS = (Part(f"{_EXPERTS}.down_proj.weight"),)
_SHARED = linear("mlp.shared_expert.down_proj")
_STACKED = (Part("mlp.experts.down_proj", axis=1, stacked=True),)
"""Experts in one tensor, as transformers 5 holds them in the running model. It saves them separately; other programs
save them like this."""
_QWEN_MOE_READERS = (
    *Layout.readers,
    "mlp.gate",
    f"{_EXPERTS}.gate_proj",
    f"{_EXPERTS}.up_proj",
    "mlp.experts.gate_up_proj",
)

LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Layout("mistral"),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3", readers=(*Layout.readers, *_QK_NORMS)),
    "Phi3ForCausalLM": Layout(
        "phi3", readers=("self_attn.qkv_proj", "mlp.gate_up_proj", "input_layernorm", "post_attention_layernorm")
    ),
    # Gemma multiplies the embedding's output by sqrt(d). Directions are unchanged by that, so the rows are edited like
    # any.
    "Gemma2ForCausalLM": Layout(
        "gemma2",
        tied=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        gain_offset=1.0,
        softcap_key="final_logit_softcapping",
        own_scores=True,
        readers=_GEMMA_READERS,
    ),
    "Gemma3ForCausalLM": Layout(
        "gemma3_text",
        tied=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        gain_offset=1.0,
        softcap_key="final_logit_softcapping",
        readers=(*_GEMMA_READERS, *_QK_NORMS),
    ),
    "Olmo2ForCausalLM": Layout(
        "olmo2",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        readers=(*_READERS, *_QK_NORMS),
    ),
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
        attention_module="attn.c_proj",
        mlp_module="mlp.c_proj",
        final_norm="ln_f",
        centred=True,
        readers=("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc"),
        constants=("attn.bias", "attn.masked_bias"),
        mlp_bias="always",
        blocks_key="n_layer",
        width_key="n_embd",
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
        attention_module="attention.dense",
        mlp_module="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        centred=True,
        readers=("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "mlp.dense_h_to_4h"),
        constants=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        mlp_bias="always",
    ),
    "MixtralForCausalLM": Layout(
        "mixtral",
        mlp=((Part("block_sparse_moe.experts.{}.w2.weight"),), _STACKED),
        mlp_module="mlp",
        readers=(
            *Layout.readers,
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "mlp.gate",
            "mlp.experts.gate_up_proj",
        ),
        experts_keys=("num_local_experts",),
    ),
    # A gate scales the shared expert's output, as routing weights scale the others'. Scaling does not change
    # directions.
    "Qwen2MoeForCausalLM": Layout(
        "qwen2_moe",
        mlp=((*_QWEN_EXPERTS, _SHARED), (*_STACKED, _SHARED), (_MLP,)),
        mlp_module="mlp",
        readers=(
            *_QWEN_MOE_READERS,
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert_gate",
        ),
        experts_keys=("num_experts", "num_local_experts"),
    ),
    "Qwen3MoeForCausalLM": Layout(
        "qwen3_moe",
        mlp=(_QWEN_EXPERTS, _STACKED, (_MLP,)),  # some blocks may be dense
        mlp_module="mlp",
        readers=(*_QWEN_MOE_READERS, *_QK_NORMS),
        experts_keys=("num_experts", "num_local_experts"),
    ),
    # A token's routing weights sum to 1, so a constant in every expert's bias is that constant in the stream.
    "GptOssForCausalLM": Layout(
        "gpt_oss",
        mlp=((Part("mlp.experts.down_proj", axis=2, bias="mlp.experts.down_proj_bias", stacked=True),),),
        mlp_module="mlp",
        readers=(
            *Layout.readers,
            "self_attn.sinks",
            "mlp.router",
            "mlp.experts.gate_up_proj",
            "mlp.experts.gate_up_proj_bias",
        ),
        mlp_bias="always",
        own_scores=True,
        experts_keys=("num_local_experts", "num_experts"),
    ),
}
"""Layouts by the architecture's name in config.json, under `architectures`."""
