"""Gradients that are streamed backwards block by block are those of the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.curvature import head_gradient
from llmquant.model.skeleton import Skeleton
from llmquant.source.resolve import open_source

IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))


def streamed(skeleton: Skeleton) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of labels of seed 0 at what enters the first block, and at the outputs of all linears."""
    at_outputs = dict[str, Tensor]()
    hidden = [skeleton.embed(IDS)]
    for block in skeleton.blocks:
        with block.loaded():
            hidden.append(block.forward(hidden[-1]))
    with skeleton.head() as logits_of:
        random_N = torch.rand(IDS.numel(), generator=torch.Generator().manual_seed(0))
        gradient = head_gradient(hidden.pop(), logits_of, random_N)
    for block in reversed(skeleton.blocks):
        with block.loaded():
            modules = [name for names in block.steps for name in names]
            found = block.gradients(hidden.pop(), gradient, torch.float32, linears=modules)
            gradient = found.entering
            at_outputs |= {name: sum(parts) for name, parts in found.at_outputs.items() if parts}  # type: ignore[misc]
    assert all(tensor.is_meta for _, tensor in skeleton.model.named_parameters()), "a block was not freed"
    return gradient, at_outputs


def whole(folder: Path, entering: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by autograd through the stock model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output})

    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) or type(linear).__name__ == "Conv1D":
            linear.register_forward_hook(keep(name))
    first: list[Tensor] = []
    model.get_submodule(entering).register_forward_pre_hook(
        lambda module, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits = model(IDS, use_cache=False).logits.flatten(0, 1)
    sums, generator = logits.detach().softmax(1).cumsum(1), torch.Generator().manual_seed(0)
    random = torch.cat([torch.rand(n, 1, generator=generator) for n in (1, len(logits) - 1)])  # as it comes in chunks
    labels = torch.searchsorted(sums, random * sums[:, -1:])
    gradients = torch.autograd.grad(
        logits.log_softmax(1).gather(1, labels).sum(), [first[0], *outputs.values()], allow_unused=True
    )
    return gradients[0], {n: g for n, g in zip(outputs, gradients[1:], strict=True) if g is not None}


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "gpt2"])
def test_streamed_gradients_equal_autograd(name: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(name)
    skeleton = Skeleton(open_source(folder))
    if skeleton.parked:
        pytest.skip("its forwards are parked: no curvature")
    gradient, at_outputs = streamed(skeleton)
    expected, at_all = whole(folder, skeleton.blocks[0].name)
    scale = expected.abs().max()
    torch.testing.assert_close(gradient / scale, expected / scale, rtol=0, atol=1e-5)
    shared = at_outputs.keys() & at_all.keys()
    assert shared, "no linear of a block is known to both"
    for linear in shared:
        scale = at_all[linear].abs().max().clamp(min=1e-12)
        torch.testing.assert_close(at_outputs[linear] / scale, at_all[linear] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_demand", [False, True], ids=["in memory", "read for every batch"])
def test_gradients_go_through_experts(on_demand: bool, tmp_path: Path) -> None:
    """Their linears have other names in the stock model, or none: what comes out of the first block is compared."""
    config = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16}
    folder = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", config))
    skeleton = Skeleton(open_source(folder))
    if on_demand:
        assert skeleton.read_experts_on_demand(0)
    gradient, _ = streamed(skeleton)
    expected, _ = whole(folder, skeleton.blocks[0].name)
    torch.testing.assert_close(gradient / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)
