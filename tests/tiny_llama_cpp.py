"""Tiny checkpoints in llama.cpp: the same weights as a GGUF file, and the logits it computes with them."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def as_gguf(source: Path, path: Path) -> None:
    """Write the weights of a tiny untied Llama as llama.cpp reads them, without a vocabulary."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        data = tensor.float().numpy()
        if count := heads.get(name.split(".")[-2]):
            # The two halves of a head that rotate together lie side by side there.
            data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A GGUF model in llama.cpp, as a context manager."""

    def __init__(self, path: Path, tokens: list[int]) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.tokens = tokens
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), self.api.llama_model_default_params())
        assert self.model, "llama.cpp does not load the model"
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.type_k = settings.type_v = self.api.GGML_TYPE_F32
        settings.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in fp16
        self.context = self.api.llama_init_from_model(self.model, settings)
        assert self.context, "llama.cpp makes no context"

    def steer(self, path: Path) -> None:
        """Add a control vector as llama.cpp's own `--control-vector` does: direction.N is the N-th of its buffer,
        from 1."""
        tensors = {int(t.name.split(".")[1]): np.array(t.data) for t in gguf.GGUFReader(path).tensors}
        width = len(next(iter(tensors.values())))
        buffer = np.zeros((max(tensors), width), np.float32)
        for layer, vector in tensors.items():
            buffer[layer - 1] = vector
        last = self.api.llama_model_n_layer(self.model)
        data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert self.api.llama_set_adapter_cvec(self.context, data, buffer.size, width, 1, last) == 0

    def logits(self) -> Tensor:
        """`[tokens, vocabulary]` of the text."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        batch = self.api.llama_batch_init(len(self.tokens), 0, 1)
        batch.n_tokens = len(self.tokens)
        for i, token in enumerate(self.tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self.api.llama_decode(self.context, batch) == 0
        size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        rows = [self.api.llama_get_logits_ith(self.context, i)[:size] for i in range(len(self.tokens))]
        self.api.llama_batch_free(batch)
        return torch.tensor(rows)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
