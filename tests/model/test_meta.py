"""What the checkpoint's tensors are called in the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmquant.errors import SourceError
from llmquant.model.names import checked_names, names_in


class Name(str):
    """A text that counts how often it is compared with another one."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)


def model_and_source(layers: int) -> tuple[Any, Any]:
    """A Llama on the meta device and a source that has its tensors."""
    config = LlamaConfig(**{**tiny.LLAMA, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    infos = {name: SimpleNamespace(shape=tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    tensors = {Name(name): info for name, info in infos.items()}
    return model, SimpleNamespace(name="model", tensors=tensors)


def names_of_tensors(model: Any, source: Any) -> dict[str, str]:
    return checked_names(model, source, names_in(model, source).renamed)


def comparisons(layers: int) -> float:
    """How many comparisons of names each tensor costs."""
    model, source = model_and_source(layers)
    Name.compared = 0
    assert names_of_tensors(model, source) == {name: name for name in model.state_dict()}
    return Name.compared / len(source.tensors)


def test_the_work_for_a_tensor_does_not_grow_with_their_number() -> None:
    assert comparisons(24) < 1.5 * comparisons(4) + 1


def test_two_tensors_of_one_name_are_refused() -> None:
    model, source = model_and_source(1)
    source.tensors["norm.weight"] = source.tensors["model.norm.weight"]  # named as in the base model
    with pytest.raises(SourceError, match=r"^model: norm\.weight: a second tensor for model\.norm\.weight$"):
        names_of_tensors(model, source)
