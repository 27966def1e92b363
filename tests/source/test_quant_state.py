"""A stranger's bitsandbytes state is read as it is, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.errors import SourceError
from llmquant.source.header import TensorInfo
from llmquant.source.layouts import bitsandbytes

W = "m.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
SHAPE = (24, 32)  # 768 codes, 12 blocks of 64, one outer block


def parts(*, double: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    dice = torch.Generator().manual_seed(0)
    tensors = {
        W: torch.randint(0, 256, (384, 1), generator=dice, dtype=torch.uint8),
        f"{W}.absmax": torch.rand(12, generator=dice),
        f"{W}.quant_map": torch.linspace(-1, 1, 16),
    }
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(SHAPE)}
    if double:
        tensors[f"{W}.absmax"] = torch.randint(0, 256, (12,), generator=dice, dtype=torch.uint8)
        tensors |= {f"{W}.nested_absmax": torch.rand(1, generator=dice)}
        tensors |= {f"{W}.nested_quant_map": torch.linspace(-1, 1, 256)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
    return tensors, state


def encoded(state: Any) -> Tensor:
    data = state if isinstance(state, bytes) else json.dumps(state).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def read_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight as the layout's reader finds it."""
    infos = {
        name: TensorInfo(name, "f", tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    found = bitsandbytes(infos, {}, tensors.__getitem__)
    dense = {name: linear.dense(tensors.__getitem__) for name, linear in found.items()}
    assert all(tuple(weight.shape) == found[name].shape for name, weight in dense.items())
    return dense


@pytest.mark.parametrize("double", [False, True])
def test_a_sound_state_is_read_by_its_formula(double: bool) -> None:
    tensors, state = parts(double=double)
    (weight,) = read_all(tensors | {STATE: encoded(state)}).values()
    octet, scale = int(tensors[W][40]), tensors[f"{W}.absmax"][1]
    if double:
        scale = tensors[f"{W}.nested_quant_map"][int(scale)] * tensors[f"{W}.nested_absmax"][0] + 0.03
    assert float(weight.view(-1)[80]) == pytest.approx(float(tensors[f"{W}.quant_map"][octet >> 4] * scale))
    assert float(weight.view(-1)[81]) == pytest.approx(float(tensors[f"{W}.quant_map"][octet & 15] * scale))


HOSTILE: list[tuple[Any, str]] = [
    (b"", r"0 bytes of torch\.uint8; expected JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe\x00", "not valid JSON"),
    (b"[1]", "a JSON list; expected a JSON object"),
    (b"[" * 50_000, "not valid JSON"),
    (b" " * 70_000, "70000 bytes"),
    ({"shape": None}, "shape None; expected a short list"),
    ({"shape": "24"}, "shape '24'"),
    ({"shape": []}, r"shape \[\]"),
    ({"shape": [24, -32]}, r"shape \[24, -32\]"),
    ({"shape": [0, 32]}, r"shape \[0, 32\]"),
    ({"shape": [True, 768]}, r"shape \[True, 768\]"),
    ({"shape": [24.0, 32]}, r"shape \[24\.0, 32\]"),
    ({"shape": [2**39, 2**39]}, r"m\.weight: 384 bytes; expected 4 bits for each of"),
    ({"shape": [24, 30]}, r"m\.weight: 384 bytes"),
    ({"blocksize": 0}, "blocksize 0; expected a whole number from 1"),
    ({"blocksize": -64}, "blocksize -64"),
    ({"blocksize": 2**60}, "blocksize 1152921504606846976"),
    ({"blocksize": 64.0}, r"blocksize 64\.0"),
    ({"blocksize": 32}, r"absmax: torch\.\w+ \[12\]; expected 24"),
    ({"dtype": "int8"}, "dtype 'int8'; expected float16 or bfloat16 or float32"),
    ({"dtype": "nn"}, "dtype 'nn'"),
    ({"dtype": 7}, "dtype 7"),
    ({"dtype": "__class__"}, "dtype '__class__'"),
    ({"quant_type": "int4"}, "quant_type 'int4'; expected nf4 or fp4"),
    ({"nested_blocksize": 0}, "nested_blocksize 0"),
    ({"nested_blocksize": 2}, r"nested_absmax: torch\.float32 \[1\]; expected 6 numbers"),
    ({"nested_offset": "x"}, "nested_offset 'x'; expected a finite number"),
    ({"nested_offset": float("nan")}, "nested_offset nan"),
    ({"nested_offset": float("inf")}, "nested_offset inf"),
    ({"nested_offset": 10**400}, "nested_offset 1000"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_hostile_state_is_one_line(change: Any, message: str) -> None:
    tensors, state = parts(double=True)
    with pytest.raises(SourceError, match=message) as caught:
        read_all(tensors | {STATE: encoded(change if isinstance(change, bytes) else state | change)})
    assert "m.weight" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["shape", "blocksize", "dtype", "quant_type", "nested_blocksize", "nested_offset"])
def test_a_missing_key_is_named(key: str) -> None:
    tensors, state = parts(double=True)
    del state[key]
    with pytest.raises(SourceError, match=rf"__nf4: {key} missing; expected"):
        read_all(tensors | {STATE: encoded(state)})


@pytest.mark.parametrize("leaf", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_tensor_that_is_missing_or_of_another_size_is_named(leaf: str) -> None:
    tensors, state = parts(double=True)
    whole = tensors | {STATE: encoded(state)}
    name = f"{W}{leaf}"
    with pytest.raises(SourceError, match=rf"^{name}: is missing beside"):
        read_all({key: tensor for key, tensor in whole.items() if key != name})
    for other in (whole[name][:-1], torch.cat([whole[name]] * 2), whole[name][None], whole[name].to(torch.int64)):
        if leaf == "" and other.dim() == 3:
            continue  # the shape of the codes does not matter
        with pytest.raises(SourceError, match=rf"^{name}: "):
            read_all(whole | {name: other})


def test_a_second_state_and_one_that_is_no_text_are_refused() -> None:
    tensors, state = parts(double=False)
    both = {STATE: encoded(state), STATE.replace("nf4", "fp4"): encoded(state)}
    with pytest.raises(SourceError, match="is a second quant_state"):
        read_all(tensors | both)
    with pytest.raises(SourceError, match=r"bytes of torch\.float32; expected JSON as uint8"):
        read_all(tensors | {STATE: encoded(state).float()})


def test_a_hostile_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    tensors, state = parts(double=False)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | {STATE: encoded(state)}, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    assert isinstance(source, PackedSource)
    assert source.read(W).shape == SHAPE
    save_file(tensors | {STATE: encoded(b"\x80 no JSON")}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=rf"^{tmp_path.name}: {STATE}: not valid JSON"):
        open_checkpoint(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([64, 0, -1, 2**70]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "other")
DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


@st.composite
def mutants(draw: st.DrawFn) -> dict[str, Tensor]:
    """Sound tensors and state with some fields, bytes, sizes and dtypes changed, or parts left out."""
    tensors, state = parts(double=draw(st.booleans()))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        if draw(st.booleans()):
            state.pop(key, None)
        else:
            state[key] = draw(JSON)
    data = json.dumps(state).encode()
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + draw(st.integers(0, 9)) :]
    tensors[STATE] = encoded(data)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        fate = draw(st.integers(0, 2))
        if fate == 0:
            tensors.pop(name, None)
        elif name in tensors and fate == 1:
            tensors[name] = tensors[name].reshape(-1)[: draw(st.integers(0, 800))]
        elif name in tensors:
            tensors[name] = tensors[name].to(draw(st.sampled_from(DTYPES)))
    return tensors


@settings(max_examples=400, deadline=None)
@given(mutants())
def test_mutants_are_read_or_refused(tensors: dict[str, Tensor]) -> None:
    try:
        read_all(tensors)
    except SourceError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()
    assert len(message) < 600


def test_codes_in_wider_elements_are_the_same_bytes() -> None:
    """`bnb_4bit_quant_storage`: the same bytes as bfloat16."""
    tensors, state = parts(double=False)
    (plain,) = read_all(tensors | {STATE: encoded(state)}).values()
    wide = tensors[W].view(-1).view(torch.bfloat16)[:, None]
    (found,) = read_all(tensors | {W: wide, STATE: encoded(state)}).values()
    assert torch.equal(plain, found)
