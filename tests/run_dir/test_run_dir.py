"""The output folder: whole or not there at all, and the bytes that were given."""

import errno
import hashlib
import json
import os
import stat
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from llmquant.errors import OutputError, VerifyError
from llmquant.formats.base import Layout
from llmquant.run_dir import RunDir
from llmquant.run_dir.shards import split_shards

TENSORS: dict[str, Tensor] = {
    "a.weight": torch.randn(5, 7).bfloat16(),
    "b.bias": torch.tensor([torch.nan, -torch.inf, -0.0]),
    "c.packed": torch.randint(-(2**31), 2**31, (3, 9)).to(torch.int32),
    "d.scalar": torch.tensor(3, dtype=torch.int64),
    "e.empty": torch.zeros(0, 4, dtype=torch.float16),
    "f.mask": torch.tensor([True, False, True]),
    "g.half": torch.randn(2, 2, 3).half(),
    "h.bytes": torch.arange(11, dtype=torch.uint8),
    "i.transposed": torch.randn(4, 6).T,
    "j.fp8": torch.randn(9).to(torch.float8_e4m3fn),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(out: Path, max_shard: int = 10**9, *, overwrite: bool = False) -> Path:
    """A whole run that writes TENSORS, a report and a cost file."""
    with RunDir(out, overwrite=overwrite) as run:
        run.open_shards(LAYOUT, max_shard)
        for name in reversed(TENSORS):
            run.tensors.write(name, TENSORS[name])
        run.tensors.finish()
        run.write_json("report.json", {"schema_version": 1})
        run.write_json("cost.json", {"seconds": 1.5})
        run.write_bytes("sub/notes.txt", b"hello\n")
        run.commit()
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- shards --------------------------------------------------------------------------------------------
layouts = st.lists(
    st.tuples(st.sampled_from([torch.int8, torch.bfloat16, torch.int64]), st.lists(st.integers(0, 6), max_size=3)),
    min_size=1,
    max_size=12,
).map(lambda entries: {f"t{i}": (dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)})


def sizes(layout: Layout) -> dict[str, int]:
    return {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in layout.items()}


@settings(deadline=None)
@given(layouts, st.integers(1, 300))
def test_shards_keep_the_order_and_are_as_full_as_they_may_be(layout: Layout, limit: int) -> None:
    shards, nbytes = split_shards(layout, limit), sizes(layout)
    assert [name for shard in shards for name in shard] == list(layout)
    assert all(shards)
    for shard in shards:
        assert sum(nbytes[name] for name in shard) <= limit or len(shard) == 1
    for shard, following in pairwise(shards):
        assert sum(nbytes[name] for name in shard) + nbytes[following[0]] > limit


def test_a_shard_may_be_full_to_the_last_byte() -> None:
    layout: Layout = dict.fromkeys("abc", (torch.int8, (5,)))
    assert split_shards(layout, 10) == [["a", "b"], ["c"]]
    assert split_shards(layout, 9) == [["a"], ["b"], ["c"]]


# -- weights -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_shard", [1, 40, 100, 10**9])
def test_tensors_come_back_bit_for_bit_through_safetensors(tmp_path: Path, max_shard: int) -> None:
    found: dict[str, Tensor] = {}
    for file in write(tmp_path / "out", max_shard).glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no mapping)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)


@pytest.mark.parametrize("max_shard", [40, 100])
def test_the_index_names_the_file_of_every_tensor_and_the_total_size(tmp_path: Path, max_shard: int) -> None:
    out = write(tmp_path / "out", max_shard)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    expected: dict[str, str] = {}
    for file in files:
        with safe_open(out / file, "pt") as reader:
            expected |= dict.fromkeys(reader.keys(), file)
    assert len(files) == len(split_shards(LAYOUT, max_shard)) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index == {"metadata": {"total_size": sum(sizes(LAYOUT).values())}, "weight_map": expected}


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    assert sorted(path.name for path in out.glob("*safetensors*")) == ["model.safetensors"]


def test_files_have_their_full_size_from_the_start(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run:
        run.open_shards({"a": (torch.float32, (1000, 50))}, 10**9)
        status = (run.path / "model.safetensors").stat()
        assert status.st_size > 200_000
        assert status.st_blocks * 512 >= 200_000


WRONG = {
    "another dtype": TENSORS["a.weight"].float(),
    "another dtype of the same size": TENSORS["a.weight"].half(),
    "another shape": TENSORS["a.weight"].T,
    "flattened": TENSORS["a.weight"].reshape(-1),
    "a row too many": torch.cat([TENSORS["a.weight"]] * 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_of_another_dtype_or_shape_is_refused(tmp_path: Path, name: str) -> None:
    with RunDir(tmp_path / "out") as run:
        run.open_shards(LAYOUT, 10**9)
        with pytest.raises(VerifyError, match=r"^a\.weight: .*; expected torch.bfloat16 \(5, 7\), once$"):
            run.tensors.write("a.weight", WRONG[name])


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run:
        run.open_shards(LAYOUT, 10**9)
        run.tensors.write("a.weight", TENSORS["a.weight"])
        with pytest.raises(VerifyError, match=r"^a\.weight: .*once$"):
            run.tensors.write("a.weight", TENSORS["a.weight"])


def test_shards_with_a_missing_tensor_cannot_be_closed(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run:
        run.open_shards(LAYOUT, 10**9)
        for name in TENSORS.keys() - {"c.packed"}:
            run.tensors.write(name, TENSORS[name])
        with pytest.raises(VerifyError, match=r"^c\.packed: was planned but never written"):
            run.tensors.finish()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    short = tree(write(tmp_path / "short", 100))
    monkeypatch.undo()
    assert short == tree(write(tmp_path / "whole", 100))


def test_short_reads_are_continued_and_a_file_that_ends_early_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    with RunDir(tmp_path / "out") as run:
        run.open_shards(LAYOUT, 10**9)
        for name, tensor in TENSORS.items():
            run.tensors.write(name, tensor)
        # As Linux does it beyond 2 GiB: one call reads only a part.
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [memoryview(buffers[0])[:5]], at))
        for name, tensor in TENSORS.items():
            assert bits(run.tensors.read(name)) == bits(tensor)
        file = run.path / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(
            VerifyError, match=r"^j\.fp8: model\.safetensors ends after 8 bytes of it; expected 9 bytes"
        ):
            run.tensors.read("j.fp8")  # the last one


# -- commit --------------------------------------------------------------------------------------------
def test_the_manifest_holds_size_and_hash_of_every_file_but_no_hash_of_the_cost(tmp_path: Path) -> None:
    files = tree(write(tmp_path / "out", 100))
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["schema_version"] == 1
    assert manifest["files"].pop("cost.json") == {"sha256": None}
    del files["cost.json"]
    assert "sub/notes.txt" in files
    assert "model.safetensors.index.json" in files
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }


def test_two_runs_of_the_same_content_are_equal_byte_for_byte(tmp_path: Path) -> None:
    assert tree(write(tmp_path / "one", 100)) == tree(write(tmp_path / "two", 100))


def test_the_folder_appears_only_at_the_commit(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with RunDir(out) as run:
        run.write_json("report.json", {})
        assert not out.exists()
        assert run.path == tmp_path / "new" / "out.partial" / "output"
        run.commit()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert sorted(tree(out)) == ["manifest.json", "report.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_an_exception_leaves_the_run(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with RunDir(tmp_path / "out") as run:
            run.open_shards(LAYOUT, 100)
            run.tensors.write("a.weight", TENSORS["a.weight"])
            run.write_bytes("sub/file", b"x")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run:
        run.write_json("report.json", {})
    assert not list(tmp_path.iterdir())


def test_json_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run, pytest.raises(ValueError, match="JSON compliant"):
        run.write_json("report.json", {"kl": float("nan")})


def test_a_scratch_file_can_be_written_and_read_and_has_no_name(tmp_path: Path) -> None:
    with RunDir(tmp_path / "out") as run, run.scratch("stream") as file:
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc"
        assert run.files() == []


# -- what is there already -----------------------------------------------------------------------------
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("file", ["thesis.txt", "manifest.json", "report.json"])
def test_a_foreign_folder_is_refused_and_unchanged(tmp_path: Path, file: str, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("mine")
    with pytest.raises(OutputError, match="not written by llmquant"):
        RunDir(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {f"out/{file}": b"mine"}


def test_our_own_folder_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    out = write(tmp_path / "out", 100)
    before = tree(out)
    with pytest.raises(OutputError, match=r"already holds a checkpoint.*--overwrite"):
        RunDir(out)
    assert tree(tmp_path) == {f"out/{name}": data for name, data in before.items()}
    write(out, 10**9, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert "model.safetensors" in tree(out)
    assert "model.safetensors.index.json" not in tree(out)


def test_our_own_folder_is_unchanged_when_the_run_that_would_replace_it_fails(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), RunDir(out, overwrite=True) as run:
        run.write_bytes("x", bytes(1 // 0))
    assert tree(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "manifest.json" in tree(write(tmp_path / "out"))


def test_a_folder_filled_by_others_during_the_run_is_refused_and_unchanged(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run_beside_others() -> None:
        with RunDir(out) as run:
            run.write_json("report.json", {})
            out.mkdir()
            (out / "thesis.txt").write_text("mine")
            run.commit()

    with pytest.raises(OutputError, match="not written by llmquant"):
        run_beside_others()
    assert tree(tmp_path) == {"out/thesis.txt": b"mine"}


def test_a_strange_partial_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial: exists and is not a run"):
        RunDir(tmp_path / "out")
    assert tree(tmp_path) == {"out.partial/thesis.txt": b"mine"}


def test_a_second_run_cannot_enter_the_same_folder(tmp_path: Path) -> None:
    second = RunDir(tmp_path / "out")
    with RunDir(tmp_path / "out") as run:
        with pytest.raises(OutputError), second:
            pass
        run.write_json("report.json", {})
        run.commit()
    assert "report.json" in tree(tmp_path / "out")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        RunDir(tmp_path / "out")
    with pytest.raises(OutputError), RunDir(tmp_path / "out" / "below"):
        pass
    assert tree(tmp_path) == {"out": b"x"}


def test_the_root_folder_is_refused() -> None:
    with pytest.raises(OutputError, match="not written by llmquant"):
        RunDir(Path("/"))


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert "manifest.json" in tree(tmp_path / "disk" / "big")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["big"]


# -- disk ----------------------------------------------------------------------------------------------
def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="bytes free; expected 4611686018427387904"):
        RunDir(tmp_path / "a" / "out", needed_bytes=2**62)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    pwrite, calls = os.pwrite, []

    def full(fd: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=f"out.partial: {os.strerror(code)}; nothing was kept"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_when_the_shards_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_error_of_the_system_keeps_its_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), RunDir(tmp_path / "out"):
        os.stat(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        out = write(tmp_path / "out")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o644
