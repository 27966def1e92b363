"""Streams in files behave as streams in memory."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquant.model.streams import FileStream, Stream, Streams, spilled

SHAPES = [(2, 3, 5), (1, 7, 5), (4, 1, 5), (2, 3, 5)]
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def scratch() -> BinaryIO:
    return tempfile.TemporaryFile(buffering=0)


@pytest.fixture(params=["memory", "file"])
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    made = Stream() if request.param == "memory" else FileStream(scratch())
    yield made
    made.close()


@pytest.fixture
def file_stream() -> Iterator[FileStream]:
    made = FileStream(scratch())
    yield made
    made.close()


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate(SHAPES)]


def fill(stream: Stream, dtype: torch.dtype = torch.float32) -> None:
    for batch in batches(dtype):
        stream.append(batch)


def assert_equal(stream: Stream, expected: list[Tensor]) -> None:
    found = list(stream)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- behaviour of every stream -------------------------------------------------------------------------
@both_dtypes
def test_batches_come_back_in_order_bit_for_bit_and_again(stream: Stream, dtype: torch.dtype) -> None:
    fill(stream, dtype)
    assert_equal(stream, batches(dtype))
    assert_equal(stream, batches(dtype))


def test_special_values_come_back_bit_for_bit(stream: Stream) -> None:
    odd = torch.tensor([[[torch.nan, torch.inf, -torch.inf, -0.0, 1e-45]]])
    stream.append(odd)
    (found,) = stream
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_an_empty_stream_has_no_batches(stream: Stream) -> None:
    stream.update(lambda hidden: hidden + 1)
    assert list(stream) == []


@both_dtypes
def test_every_update_replaces_every_batch_by_a_function_of_it(stream: Stream, dtype: torch.dtype) -> None:
    fill(stream, dtype)
    expected = batches(dtype)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda hidden: hidden * 2 + 1,
        lambda hidden: hidden.flip(1),
        lambda hidden: hidden.roll(1, dims=2).transpose(0, 2).contiguous().transpose(0, 2),  # not contiguous
        lambda hidden: hidden.mul_(3),  # in place
    ]
    for function in functions:
        stream.update(function)
        expected = [function(batch.clone()) for batch in expected]
        assert_equal(stream, expected)


def test_an_update_calls_its_function_once_per_batch_in_order(stream: Stream) -> None:
    fill(stream)
    seen = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden.clone())
        return hidden

    stream.update(note)
    assert len(seen) == len(SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(seen, batches(), strict=True))


def test_an_appended_batch_may_be_overwritten_afterwards(stream: Stream) -> None:
    hidden = torch.ones(1, 2, 3)
    stream.append(hidden)
    hidden.zero_()
    assert torch.equal(next(iter(stream)), torch.ones(1, 2, 3))


def test_batches_may_be_appended_after_an_update(stream: Stream) -> None:
    fill(stream)
    stream.update(lambda hidden: -hidden)
    stream.append(torch.ones(1, 1, 5))
    assert_equal(stream, [-batch for batch in batches()] + [torch.ones(1, 1, 5)])


def test_batches_of_different_dtypes_and_strides_may_follow_each_other(stream: Stream) -> None:
    mixed = [torch.randn(2, 3, 4).bfloat16(), torch.randn(4, 3, 2).transpose(0, 2), torch.randn(1, 1, 4).half()]
    for batch in mixed:
        stream.append(batch)
    assert_equal(stream, mixed)


def test_an_iteration_may_stop_early_or_run_inside_another(stream: Stream) -> None:
    fill(stream)
    assert torch.equal(next(iter(stream)), batches()[0])
    pairs = [(a, b) for a in stream for b in stream]
    assert all(torch.equal(a, batches()[i // 4]) and torch.equal(b, batches()[i % 4]) for i, (a, b) in enumerate(pairs))
    assert len(pairs) == 16


def test_an_error_inside_an_update_comes_through(stream: Stream) -> None:
    fill(stream)
    with pytest.raises(ZeroDivisionError):
        stream.update(lambda hidden: hidden / (1 // 0))


def test_gradients_are_not_kept(stream: Stream) -> None:
    stream.append(torch.ones(1, 1, 2, requires_grad=True))
    assert not next(iter(stream)).requires_grad


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda hidden: torch.cat([hidden, hidden]),
    "shorter": lambda hidden: hidden[:1, :1],
    "wider dtype": lambda hidden: hidden.double(),
    "narrower dtype": lambda hidden: hidden.bfloat16(),
    "one that broadcasts": lambda hidden: hidden[:, :1],
    "transposed": lambda hidden: hidden.transpose(0, 1),
}


@pytest.mark.parametrize("name", OTHER)
def test_an_update_to_another_shape_or_dtype_is_refused(stream: Stream, name: str) -> None:
    fill(stream)
    with pytest.raises(ValueError, match=r"^batch 0 of a stream: .*; expected torch.float32 \(2, 3, 5\)$"):
        stream.update(OTHER[name])
    assert_equal(stream, batches())


# -- files ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at_most", [1, 7, 50])
def test_short_reads_and_writes_are_continued(
    file_stream: FileStream, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    pwrite, preadv, transfers = os.pwrite, os.preadv, []

    def short_write(fd: int, data: memoryview, at: int) -> int:
        transfers.append("write")
        return pwrite(fd, data[:at_most], at)

    def short_read(fd: int, buffers: list[memoryview], at: int) -> int:
        transfers.append("read")
        return preadv(fd, [buffers[0][:at_most]], at)

    monkeypatch.setattr(os, "pwrite", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    fill(file_stream)
    file_stream.update(lambda hidden: hidden + 1)
    assert_equal(file_stream, [batch + 1 for batch in batches()])
    assert transfers.count("write") > 2 * len(SHAPES)
    assert transfers.count("read") > 2 * len(SHAPES)


def test_a_file_that_lost_its_end_is_an_error() -> None:
    file = scratch()
    stream = FileStream(file)
    fill(stream)
    file.truncate(100)
    with pytest.raises(OSError, match="ended early"):
        list(stream)
    stream.close()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_write_error_in_the_background_comes_through(
    file_stream: FileStream, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for batch in batches()[:count]:
        file_stream.append(batch)

    def full(fd: int, data: memoryview, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file_stream.update(lambda hidden: hidden + 1)


def test_closing_closes_the_file() -> None:
    file = scratch()
    FileStream(file).close()
    assert file.closed


# -- budget --------------------------------------------------------------------------------------------
streams_of = st.lists(st.integers(0, 50), max_size=8).map(lambda sizes: {f"s{i}": size for i, size in enumerate(sizes)})


@settings(deadline=None)
@given(streams_of, st.integers(0, 150))
def test_what_stays_in_memory_fits_and_what_spills_did_not_fit(sizes: dict[str, int], max_ram: int) -> None:
    files = spilled(sizes, max_ram)
    kept = {name: size for name, size in sizes.items() if name not in files}
    assert files.items() <= sizes.items()
    assert sum(kept.values()) <= max_ram
    for name, size in files.items():
        before = sum(kept[other] for other in sizes if other in kept and other < name)
        assert before + size > max_ram


def test_streams_are_made_in_memory_or_in_a_scratch_file_of_their_name() -> None:
    asked = []

    def make(name: str) -> BinaryIO:
        asked.append(name)
        return scratch()

    streams = Streams({"a": 4, "b": 5, "c": 2}, 7, make)
    made = {name: streams.new(name) for name in "abc"}
    assert asked == ["b"]
    assert streams.spilled == {"b": 5}
    assert {name: type(stream) for name, stream in made.items()} == {"a": Stream, "b": FileStream, "c": Stream}
    made["b"].close()
