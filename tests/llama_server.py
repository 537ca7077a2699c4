"""The real llama-server in this process, from the wheel of xllamacpp, started by its own command line."""

from __future__ import annotations

import ctypes
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

_PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
"""`bool common_params_parse(int argc, char ** argv, common_params &, llama_example, void (*)(int, char **))`"""
_SERVER = 12
"""`LLAMA_EXAMPLE_SERVER`, without which the parser does not know the options of llama-server alone."""


@contextmanager
def llama_server(command: str, slots: int = 1, threads: int = 1, port: int = 0) -> Iterator[LlamaServer]:
    """Start the server that a command line of `llama-server` describes, in fp32, for `slots` texts of 512 tokens at
    once. `port`: 0 for any free one.

    xllamacpp has no attribute for control vectors, so llama.cpp's own parser fills the parameters in the Python object,
    which lie behind the object's header. The version of the wheel is pinned.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    parse = getattr(ctypes.CDLL(xllamacpp.xllamacpp.__file__), _PARSE)
    parse.restype = ctypes.c_bool
    words = shlex.split(f"{command} -c {512 * slots} -t {threads} -tb {threads} -fa off -ctk f32 -ctv f32")
    arguments = (ctypes.c_char_p * (len(words) + 1))(*[w.encode() for w in words], None)
    place = ctypes.c_void_p(id(params) + object.__basicsize__)
    assert parse(len(words), arguments, place, _SERVER, None), command
    params.n_parallel, params.warmup, params.port = slots, False, port
    server = xllamacpp.Server(params)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server


class LlamaServer:
    """A client of one server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(self.url + path, json=body, timeout=300).raise_for_status().json()

    def reply(self, prompt: Sequence[int], tokens: int, **settings: Any) -> tuple[list[int], list[dict[int, float]]]:
        """(the greedy reply, for each of its tokens the log-probabilities of the five likeliest tokens)."""
        body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "n_probs": 5, "return_tokens": True}
        answer = self.post("/completion", body | {"cache_prompt": False, **settings})
        steps = answer["completion_probabilities"]
        return answer["tokens"], [{c["id"]: c["logprob"] for c in step["top_logprobs"]} for step in steps]
