"""Lists of what stays dense: every entry is needed, none names a quantized linear, whatever a class calls it."""

import re

from hypothesis import given
from hypothesis import strategies as st

from llmquant.formats.ignored import ignore_list

BLOCKS = range(12)
INNER = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# The front of a block's name in a checkpoint, in classes of transformers, and in a server's class.
FRONTS = ("model.language_model", "model", "language_model.model", "transformer")


def names(entries: list[str], module: str) -> bool:
    """As compressed-tensors, vLLM and SGLang compare: the whole name, or a regular expression from its start on."""
    return any(re.match(e.removeprefix("re:"), module) if e.startswith("re:") else e == module for e in entries)


def test_few_names_stand_as_they_are_and_many_as_a_pattern() -> None:
    quantized = [f"model.layers.{i}.{name}" for i in BLOCKS for name in INNER]
    gates = [f"model.layers.{i}.mlp.gate" for i in BLOCKS]
    assert ignore_list(["lm_head", *gates[:8]], quantized, by_pattern=False) == ["lm_head", *gates[:8]]
    assert ignore_list(["lm_head", *gates], quantized, by_pattern=False) == ["lm_head", r"re:(.*\.)?gate$"]


def test_towers_heads_and_routers_are_named_in_every_class() -> None:
    inside = [f"layers.{i}.{name}" for i in BLOCKS for name in INNER]
    tower = [f"blocks.{i}.attn.{name}" for i in BLOCKS for name in ("qkv", "proj")] + ["merger.mlp.0"]
    mtp = ["mtp.fc", "mtp.layers.0.mlp.gate_proj", "mtp.layers.0.self_attn.q_proj"]
    dense = ["lm_head", *(f"model.visual.{name}" for name in tower), *mtp, "model.language_model.layers.3.mlp.gate"]
    quantized = [f"model.language_model.{name}" for name in inside]
    entries = ignore_list(dense, quantized, by_pattern=True)
    assert entries == [rf"re:(.*\.)?{end}" for end in ("lm_head$", r"visual\..*", r"mtp\..*", "gate$")]
    for front in FRONTS:
        assert names(entries, f"{front}.layers.3.mlp.gate")
        assert not [name for name in inside if names(entries, f"{front}.{name}")]
    for front in ("visual", "model.visual", "model.model.visual"):
        assert all(names(entries, f"{front}.{name}") for name in tower)
    assert not names(entries, "model.language_model.layers.3.mlp.gate_up_proj")


def test_a_further_block_and_linears_of_some_blocks_are_told_by_their_numbers() -> None:
    quantized = [f"model.layers.{i}.{name}" for i in BLOCKS for name in INNER]
    quantized.remove("model.layers.0.mlp.down_proj")
    further = ["model.layers.61.eh_proj", "model.layers.61.mlp.up_proj"]
    entries = ignore_list(["model.layers.0.mlp.down_proj", *further], quantized, by_pattern=True)
    assert entries == [r"re:(.*\.)?layers\.0\.mlp\.down_proj$", r"re:(.*\.)?layers\.61\..*"]


def test_a_name_that_no_pattern_can_tell_apart_stands_as_it_is() -> None:
    assert ignore_list(["up_proj"], ["model.layers.0.mlp.up_proj"], by_pattern=True) == ["up_proj"]


PARTS = st.sampled_from(["model", "layers", "visual", "mlp", "gate", "up_proj", "0", "1", "61"])
MODULES = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), max_size=12, unique=True)


@given(MODULES, MODULES, st.booleans())
def test_all_that_is_dense_is_named_and_nothing_that_is_quantized(dense: list[str], other: list[str], by: bool) -> None:
    quantized = sorted(set(other) - set(dense))
    entries = ignore_list(dense, quantized, by_pattern=by)
    assert [name for name in [*dense, *quantized] if names(entries, name)] == dense
