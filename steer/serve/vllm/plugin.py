"""The plugin of vLLM: taps each model that it loads, and has its runner and its requests know of sliders.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import logging
import os
from functools import wraps
from typing import Any

from torch import nn

from steer.checkpoint.anatomy import Anatomy
from steer.errors import UnsupportedError
from steer.serve.vllm.requests import check_requests, steer_steps
from steer.serve.vllm.taps import tap

_log = logging.getLogger(__name__)
_VERSION = "1"
"""Part of the key of vLLM's compiled graphs: a new number when the operations or their places change."""


def register() -> None:
    """The plugin: tap each model that vLLM loads, and key its compiled graphs by that. Further calls do nothing."""
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(VllmConfig.compute_hash, "steer"):
        return
    # The second model runner lays batches out on the device; the first one's order is known before the pass.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    hash_of, load, finish = VllmConfig.compute_hash, BaseModelLoader.load_model, VllmConfig.__post_init__

    @wraps(hash_of)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        return hashlib.sha256(f"{hash_of(self, *args, **kwargs)} steer {_VERSION}".encode()).hexdigest()[:10]

    @wraps(finish)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        finish(self, *args, **kwargs)
        # On a GPU the operations run between the captured pieces of a graph, as attention does.
        compilation = self.compilation_config
        if compilation.splitting_ops and compilation.cudagraph_mode:
            compilation.splitting_ops += ["steer::edit_stream_", "steer::edit_writer_"]
            if compilation.cudagraph_mode.has_full_cudagraphs():
                compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE

    @wraps(load)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = load(self, vllm_config, model_config, *args, **kwargs)
        if model_config is vllm_config.model_config:  # not a draft model
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

            if not hasattr(GPUModelRunner._model_forward, "__wrapped__"):
                steer_steps(GPUModelRunner)
            try:
                tap(model, Anatomy.of(model_config.hf_config.to_dict(), model_config.model))
            except UnsupportedError as e:
                _log.warning("no sliders on this model: %s", e)
        return model

    check_requests(InputProcessor)
    compute_hash.steer = True  # type: ignore[attr-defined]
    VllmConfig.compute_hash, VllmConfig.__post_init__ = compute_hash, post_init
    BaseModelLoader.load_model = load_model
