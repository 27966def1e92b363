"""What blocks share is seen on made-up weights, and a model that no way fits is refused by name."""

import pytest
import torch
from torch import nn
from toys import REFUSED, TOYS, ToyWeights
from transformers import AutoModelForCausalLM, HrmTextConfig

from llmquant.errors import SourceError
from llmquant.model.made_up import made_up
from llmquant.model.sharing import find_sharing


@pytest.mark.parametrize("name", TOYS)
def test_what_blocks_share_is_named(name: str) -> None:
    make, reason = TOYS[name]
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = find_sharing(model, model.model.layers, ToyWeights(model))
    assert found.reason == reason
    assert found.widths == ((2, 2, 2) if name == "found" else (0, 0, 0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "weights are put back"
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_go_block_by_block_are_refused(name: str) -> None:
    make, got = REFUSED[name]
    model = make()
    with pytest.raises(SourceError) as error:
        find_sharing(model, model.model.layers, ToyWeights(model))
    assert str(error.value).startswith(f"toy: Toy cannot be streamed block by block: {got}; expected ")


def test_embeddings_that_are_needed_between_blocks_are_known() -> None:
    late = TOYS["tokens"][0]()
    assert find_sharing(late, late.model.layers, ToyWeights(late)).inner == {late.model.by_layer}
    part = TOYS["view"][0]()
    assert find_sharing(part, part.model.layers, ToyWeights(part)).inner == {part.model.by_layer}
    early = TOYS["dict"][0]()
    assert not find_sharing(early, early.model.layers, ToyWeights(early)).inner


def test_a_model_that_visits_its_blocks_in_cycles_is_refused() -> None:
    config = HrmTextConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rope = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rope
    with pytest.raises(SourceError, match=r"HrmTextForCausalLM cannot be .*: a block runs \d+ times in one forward"):
        find_sharing(model, model.model.L_module.layers, ToyWeights(model))


def test_made_up_weights_take_no_memory_and_differ_by_row() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10**7, 10**4), nn.Linear(10**4, 10**6), nn.Conv1d(4, 4, 3), nn.LayerNorm(8))
        model.register_buffer("table", torch.empty(5, dtype=torch.long))
    with made_up(model, torch.device("cpu")), torch.no_grad():
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        rows = model[0](torch.arange(4))
        assert rows.unique(dim=0).shape == (4, 10**4)
        assert model[1](rows).shape == (4, 10**6)
        assert torch.equal(model.get_buffer("table"), torch.ones(5, dtype=torch.long))
        assert model[2](torch.ones(1, 4, 8)).shape == (1, 4, 6)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
