"""Clients of our output that the tests ask for a second opinion."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.checkpoint import PackedSource, open_checkpoint


class LlamaCpp:
    """llama.cpp with one model, by the wheel xllamacpp: token ids, and all log probabilities after a prefix."""

    def __init__(self, file: Path, n_ctx: int = 512) -> None:
        xllamacpp: Any = pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cache_ram_mib = n_ctx, 1, 0, 0
        params.warmup, params.verbosity = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError:  # it draws a port, which may be taken
            self.server = xllamacpp.Server(params)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        asked = json.dumps({"content": text, "add_special": special}).encode()
        url = f"{self.server.listening_address}/tokenize"
        request = urllib.request.Request(url, asked, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[int] = json.loads(answer.read())["tokens"]
        return found

    def log_probs(self, ids: Sequence[int], vocab_size: int) -> Tensor:
        """Of the token behind `ids`, float64 [vocab_size]."""
        # The bias makes it choose a token that can be shown; the probabilities are those before any bias.
        asked = {"prompt": list(ids), "n_predict": 1, "n_probs": vocab_size, "logit_bias": [[2, 1e6]]}
        answer = self.server.handle_completions(asked | {"cache_prompt": True})
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        found = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
        for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[item["id"]] = item["logprob"]
        assert not found.isnan().any()
        return found


def dequantized(source: Path, quantized: Path) -> Any:
    """The original in float32 with the weights that open_checkpoint reads from `quantized`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    stored = open_checkpoint(quantized)
    assert isinstance(stored, PackedSource)
    for name in stored.packed:
        weight = model.get_parameter(name)
        weight.data = stored.read(name).to(weight.dtype)
    return model


def log_probs(model: Any, ids: Tensor) -> Tensor:
    """Of every next token of one window, float64 [time, vocab]."""
    with torch.no_grad():
        found: Tensor = model(ids[None]).logits[0].double().log_softmax(-1)
    return found


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference, other) over positions, nats."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())
