"""The header reader: exact bytes, every kind of damage refused by SourceError, and files shared with safetensors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llmquant.errors import SourceError
from llmquant.source.header import DTYPES, MAX_HEADER_BYTES, TensorInfo, build_header, header_length, parse_header

T = TypeVar("T")

GOLDEN_HEAD = bytes.fromhex("90 00 00 00 00 00 00 00") + (
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}      '
)
VALID = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]},
}


def raw(table: Any) -> bytes:
    return table if isinstance(table, bytes) else json.dumps(table).encode()


def parse(table: Any, data_bytes: int = 20) -> dict[str, TensorInfo]:
    header = raw(table)
    return parse_header("x.safetensors", header, 8 + len(header) + data_bytes)


def refusal(table: Any, data_bytes: int = 20) -> str:
    """The message with which `table` is refused; it must be one line and name the file."""
    with pytest.raises(SourceError) as caught:
        parse(table, data_bytes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("x.safetensors")
    return message


def one_line_or_value(call: Callable[[], T]) -> T | None:
    """What `call` returns, None where it raises a SourceError of one line."""
    try:
        return call()
    except SourceError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


def with_w(**changes: Any) -> dict[str, Any]:
    return VALID | {"w": VALID["w"] | changes}


def read_whole(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    data = path.read_bytes()
    length = header_length(path.name, data[:8], len(data))
    return parse_header(path.name, data[8 : 8 + length], len(data)), data


def test_build_header_writes_these_bytes() -> None:
    head, places = build_header({"a": (torch.int8, (3,)), "b": (torch.int32, (2,))})
    assert head == GOLDEN_HEAD
    assert {name: (p.start, p.end, p.dtype, p.shape) for name, p in places.items()} == {
        "b": (152, 160, torch.int32, (2,)),
        "a": (160, 163, torch.int8, (3,)),
    }


def test_golden_bytes_are_parsed_back() -> None:
    length = header_length("x", GOLDEN_HEAD[:8], len(GOLDEN_HEAD) + 11)
    assert length == 144
    tensors = parse_header("x", GOLDEN_HEAD[8:], len(GOLDEN_HEAD) + 11)
    assert tensors["a"] == TensorInfo("a", "x", torch.int8, (3,), 160, 163)
    assert (tensors["b"].nbytes, tensors["b"].numel) == (8, 2)


def test_build_header_aligns_every_tensor_to_its_item() -> None:
    _, places = build_header({f"t{i}": (dtype, (3,)) for i, dtype in enumerate(DTYPES.values())})
    assert all(place.start % place.dtype.itemsize == 0 for place in places.values())


def test_valid_header_is_accepted_in_any_order_of_entries() -> None:
    reordered = dict(reversed(VALID.items()))
    assert parse(VALID) == parse(reordered)
    assert list(parse(reordered)) == ["w", "b"]


def test_scalars_and_empty_tensors_have_their_place() -> None:
    table = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
    }
    tensors = parse(table, 4)
    assert (tensors["scalar"].shape, tensors["scalar"].nbytes) == ((), 4)
    assert (tensors["empty"].shape, tensors["empty"].nbytes) == ((0, 7), 0)


@pytest.mark.parametrize(
    ("table", "data_bytes", "said"),
    [
        pytest.param(VALID, 19, "truncated", id="truncated"),
        pytest.param(VALID, 0, "truncated", id="no-data"),
        pytest.param(VALID, 21, "by its header", id="extra-bytes"),
        pytest.param(with_w(data_offsets=[4, 16]), 24, "no gap", id="gap-at-start"),
        pytest.param(VALID | {"b": VALID["b"] | {"data_offsets": [14, 22]}}, 22, "no gap", id="gap-between"),
        pytest.param(VALID | {"b": VALID["b"] | {"data_offsets": [8, 16]}}, 16, "no overlap", id="overlap"),
        pytest.param(VALID | {"c": VALID["b"]}, 20, "no overlap", id="same-bytes-twice"),
        pytest.param(b'{"a":{},"a":{}}', 20, "twice", id="duplicate-name"),
        pytest.param(
            b'{"a":{"dtype":"I8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "twice", id="duplicate-key"
        ),
        pytest.param(with_w(dtype="Q4_0"), 20, "dtype 'Q4_0'", id="unknown-dtype"),
        pytest.param(with_w(dtype=["BF16"]), 20, "dtype", id="dtype-is-a-list"),
        pytest.param(with_w(dtype="bf16\n"), 20, "dtype", id="dtype-with-newline"),
        pytest.param(with_w(shape=[-2, -3]), 20, "shape", id="negative-shape"),
        pytest.param(with_w(shape=[2**62, 2**62]), 20, "shape", id="huge-shape"),
        pytest.param(with_w(shape=[2**61, 2**61]), 20, "12 bytes", id="large-shape"),
        pytest.param(with_w(shape=[10**4000]), 20, "shape", id="enormous-shape"),
        pytest.param(with_w(shape=[True, 6]), 20, "shape", id="bool-shape"),
        pytest.param(with_w(shape=[2.0, 3.0]), 20, "shape", id="float-shape"),
        pytest.param(with_w(shape=[math.nan]), 20, "shape", id="nan-shape"),
        pytest.param(with_w(shape=["2", "3"]), 20, "shape", id="text-shape"),
        pytest.param(with_w(shape=6), 20, "shape", id="shape-is-a-number"),
        pytest.param(with_w(shape=[1] * 9), 20, "shape", id="too-many-dimensions"),
        pytest.param(with_w(shape=[3, 3]), 20, "12 bytes; expected 18", id="shape-against-range"),
        pytest.param(with_w(data_offsets=[12, 0]), 20, "-12 bytes", id="range-backwards"),
        pytest.param(with_w(data_offsets=[0, 12.0]), 20, "data_offsets", id="float-range"),
        pytest.param(with_w(data_offsets=[0]), 20, "data_offsets", id="half-a-range"),
        pytest.param(with_w(data_offsets=[-12, 0]), 20, "data_offsets", id="negative-range"),
        pytest.param(with_w(extra=1), 20, "malformed", id="unknown-key"),
        pytest.param({"w": {"dtype": "BF16"}}, 20, "malformed", id="missing-keys"),
        pytest.param({"w": [1, 2]}, 20, "malformed", id="entry-is-a-list"),
        pytest.param({"w": None}, 20, "malformed", id="entry-is-null"),
        pytest.param({"a\nb": VALID["w"]}, 12, "control characters", id="newline-in-name"),
        pytest.param({"a\x1b[2Jb": VALID["w"]}, 12, "control characters", id="escape-in-name"),
        pytest.param({"a\u2028b": VALID["w"]}, 12, "control characters", id="line-separator-in-name"),
        pytest.param({"\ud800": VALID["w"]}, 12, "control characters", id="lone-surrogate-in-name"),
        pytest.param({"": VALID["w"]}, 12, "empty", id="empty-name"),
        pytest.param({"__metadata__": "pt"}, 0, "__metadata__", id="metadata-is-text"),
        pytest.param(b"\x80\x05 pickle", 20, "not valid JSON", id="not-utf8"),
        pytest.param(b"{'w': 1}", 20, "not valid JSON", id="not-json"),
        pytest.param(raw(VALID)[:-9], 20, "not valid JSON", id="cut-json"),
        pytest.param(b'{"w":' * 100_000, 20, "not valid JSON", id="deep-objects"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, 20, "not valid JSON", id="deep-lists"),
        pytest.param(b'{"w":' + b"9" * 5000 + b"}", 20, "not valid JSON", id="number-of-5000-digits"),
        pytest.param([VALID], 20, "JSON list", id="a-list"),
        pytest.param(b"null", 20, "JSON NoneType", id="null"),
    ],
)
def test_damaged_header_is_refused_in_one_line(table: Any, data_bytes: int, said: str) -> None:
    assert said in refusal(table, data_bytes)


@pytest.mark.parametrize("table", [with_w(dtype="x" * 10**6), {"n" * 10**6: None}, with_w(shape=[7] * 10**5)])
def test_refusal_stays_short_whatever_the_header_holds(table: Any) -> None:
    assert len(refusal(table)) < 1000


@pytest.mark.parametrize(
    ("first_bytes", "file_size"),
    [
        (b"", 0),
        (b"\x10\0\0\0", 4),
        ((1).to_bytes(8, "little"), 100),
        ((93).to_bytes(8, "little"), 100),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 10**12),
        (b"\xff" * 8, 10**12),
    ],
)
def test_impossible_header_length_is_refused_in_one_line(first_bytes: bytes, file_size: int) -> None:
    with pytest.raises(SourceError) as caught:
        header_length("x.safetensors", first_bytes, file_size)
    assert len(str(caught.value).splitlines()) == 1


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_source_error_only(data: bytes, file_size: int) -> None:
    length = one_line_or_value(lambda: header_length("x", data[:8], file_size))
    if length is not None:
        one_line_or_value(lambda: parse_header("x", data[8 : 8 + length], file_size))


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPES))
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_header_is_either_refused_or_tiles_the_file(data: st.DataObject) -> None:
    table: dict[str, Any] = json.loads(raw(VALID))
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*table, "new"]))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole"]))
        if key == "whole" or not isinstance(table.get(name), dict):
            table[name] = data.draw(_JSON)
        else:
            table[name][key] = data.draw(_JSON)
    header = bytearray(raw(table))
    for _ in range(data.draw(st.integers(0, 2))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    tensors = one_line_or_value(lambda: parse(bytes(header)))
    if tensors is None:
        return
    infos = list(tensors.values())
    ends = [8 + len(header), *(info.end for info in infos)]
    assert [info.start for info in infos] == ends[:-1]
    assert ends[-1] == 8 + len(header) + 20
    assert all(info.numel * info.dtype.itemsize == info.nbytes for info in infos)


def test_files_of_the_safetensors_library_are_read_at_the_right_offsets(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES.values() if dtype != torch.bool]
    tensors = {f"t.{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"flag": torch.tensor([True, False]), "scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    infos, data = read_whole(tmp_path / "x.safetensors")
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        info = infos[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert data[info.start : info.end] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_safe_open_reads_files_made_with_build_header(tmp_path: Path) -> None:
    tensors = {
        "model.w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "packed": torch.tensor([[-1, 2**31 - 1]], dtype=torch.int32),
        "norm ü": torch.ones(3, dtype=torch.float32),
        "f16": torch.tensor(0.5, dtype=torch.float16),
        "empty": torch.zeros(0, dtype=torch.float16),
    }
    head, places = build_header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    data = bytearray(head) + bytearray(max(place.end for place in places.values()) - len(head))
    for name, place in places.items():
        data[place.start : place.end] = bytes(tensors[name].reshape(-1).view(torch.uint8).numpy())
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name), tensor)
