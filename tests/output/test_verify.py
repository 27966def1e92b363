"""verify_output passes what RunDir wrote and catches every bug a packer could have."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import VerifyError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.output.verify import Record, verify_output
from llmquant.plan import Plan, Row
from llmquant.quant.grid import QuantizedWeight, QuantScheme, round_scales
from llmquant.run_dir import RunDir

Array = NDArray[Any]


def spec_of(module: str, shape: tuple[int, int], bits: int, group: int, kind: str = "Linear") -> LinearSpec:
    return LinearSpec(f"{module}.weight", module, kind, shape, torch.bfloat16, QuantScheme(bits, group))


Q, K = spec_of("q", (8, 64), 4, 32), spec_of("k", (8, 64), 4, 32)  # equal but in their numbers
ODD = spec_of("odd", (5, 41), 3, -1)  # 123 bits: the last word is not full
COPIED: dict[str, Tensor] = {
    "norm.weight": torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "embed.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(2)),
    "steps": torch.tensor(7, dtype=torch.int64),
}
MAX_SHARD = 500


def weight_of(spec: LinearSpec, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.scheme.code_min, spec.scheme.code_max + 1, spec.shape, generator=generator)
    scales = torch.randn(spec.shape[0], spec.scheme.groups(spec.shape[1]), generator=generator) * 0.1
    return QuantizedWeight(codes.to(torch.int8), round_scales(scales), spec.scheme)


def plan_of(format_name: str, specs: tuple[LinearSpec, ...]) -> Plan:
    rows = [Row(spec.key, "quantized", "test", "bfloat16", spec.shape, 0, spec) for spec in specs]
    rows += [Row(name, "copied", "test", str(t.dtype), tuple(t.shape), None) for name, t in COPIED.items()]
    layout = {name: place for spec in specs for name, place in FORMATS[format_name].layout(spec).items()}
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in COPIED.items()}
    return Plan(tuple(rows), (), layout)


def write(folder: Path, format_name: str, weights: dict[LinearSpec, QuantizedWeight], max_shard: int) -> Record:
    """Write a plan of `weights` and COPIED into `folder` as the pipeline does; verify is called before the commit."""
    plan, record = plan_of(format_name, tuple(weights)), Record(format_name)
    with RunDir(folder) as run:
        run.open_shards(plan.layout, max_shard)
        for spec, weight in weights.items():
            record.quantized(spec, weight)
            for name, tensor in FORMATS[format_name].tensors(spec, weight).items():
                run.tensors.write(name, tensor)
        for name, tensor in COPIED.items():
            record.copied(name, tensor)
            run.tensors.write(name, tensor)
        run.tensors.finish()
        verify_output(run.path, plan, record)
        run.commit()
    return record


WEIGHTS = {spec: weight_of(spec, seed) for seed, spec in enumerate((Q, K, ODD))}
EVEN_WEIGHTS = {spec: weight_of(spec, 3) for spec in (spec_of("even", (64, 96), 4, 32), spec_of("v", (32, 64), 4, 32))}
PLAN = plan_of("compressed-tensors", tuple(WEIGHTS))


@pytest.mark.parametrize("max_shard", [1, MAX_SHARD, 10**9])
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_the_writer_wrote_passes(tmp_path: Path, format_name: str, max_shard: int) -> None:
    weights = dict(WEIGHTS) if format_name in ("compressed-tensors", "fake") else dict(EVEN_WEIGHTS)
    if format_name == "fake":
        conv = spec_of("conv", (8, 64), 4, 32, "Conv1D")
        weights[conv] = weight_of(conv, 9)
    record, plan = write(tmp_path / "out", format_name, weights, max_shard), plan_of(format_name, tuple(weights))
    verify_output(tmp_path / "out", plan, record)
    assert record.digests.keys() == {row.name for row in plan.rows}
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (max_shard == 10**9)


# -- an output that can be damaged ---------------------------------------------------------------------
@dataclass
class Output:
    """The shards and the index of an output, to be damaged and written again by code of the test's own.

    A tensor is its dtype's name and an array; bf16 numbers are uint16. `index` None: no index file.
    """

    shards: dict[str, dict[str, tuple[str, Array]]]
    index: dict[str, Any] | None

    def shard(self, name: str) -> dict[str, tuple[str, Array]]:
        return next(shard for shard in self.shards.values() if name in shard)


NUMPY = {"BF16": "<u2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}


def read(folder: Path) -> Output:
    shards: dict[str, dict[str, tuple[str, Array]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        shards[file.name] = {}
        for name, entry in json.loads(data[8:base]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                array = np.frombuffer(data[base + begin : base + end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
                shards[file.name][name] = (entry["dtype"], array.copy())
    return Output(shards, json.loads((folder / "model.safetensors.index.json").read_text()))


def save(output: Output, folder: Path) -> None:
    folder.mkdir()
    for file, shard in output.shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, (dtype, array) in shard.items():
            begin, data = len(data), data + array.tobytes()
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, len(data)]}
        save_file(folder / file, header, data)
    if output.index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(output.index))


def save_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("verify") / "out"
    return folder, write(folder, "compressed-tensors", WEIGHTS, MAX_SHARD)


def test_an_undamaged_copy_passes(original: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = original
    save(read(folder), tmp_path / "copy")
    verify_output(tmp_path / "copy", PLAN, record)


# -- bugs of a packer ----------------------------------------------------------------------------------
Bug = Callable[[Output], None]
PACKED, SCALE, SHAPE, ODD_PACKED = "q.weight_packed", "q.weight_scale", "q.weight_shape", "odd.weight_packed"


def edit(name: str, change: Callable[[Array], Array], dtype: str | None = None) -> Bug:
    """The bug that stores `change` of the tensor, as `dtype`."""

    def bug(output: Output) -> None:
        shard = output.shard(name)
        stored, array = shard[name]
        new = np.asarray(change(array.copy()), order="C")
        shard[name] = (dtype or stored, new)
        if output.index is not None:  # so that not the sum of sizes is what catches it
            output.index["metadata"]["total_size"] += new.nbytes - array.nbytes

    return bug


def nibbles(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A change of packed words through their codes, [rows, columns] of 4 bits."""

    def changed(words: Array) -> Array:
        octets = words.view(np.uint8)
        codes = change(np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(words), -1))
        return np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<i4")

    return changed


def flip(bit: int) -> Callable[[Array], Array]:
    def flipped(array: Array) -> Array:
        array.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        return array

    return flipped


def put(row: int, column: int, value: int) -> Callable[[Array], Array]:
    def changed(array: Array) -> Array:
        array[row, column] = value
        return array

    return changed


def as_floats(bf16: Array) -> Array:
    return (bf16.astype("<u4") << 16).view("<f4")


def ten_per_word(words: Array) -> Array:
    """3-bit codes as older packers laid them: ten in a word, two bits unused."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : 41 * 3].reshape(5, 41, 3)
    padded = np.zeros((5, 50, 3), np.uint8)
    padded[:, :41] = stream
    bits = np.concatenate([padded.reshape(5, 5, 30), np.zeros((5, 5, 2), np.uint8)], axis=2)
    return np.packbits(bits.reshape(5, -1), axis=1, bitorder="little").view("<i4")


def remove(name: str) -> Bug:
    return lambda output: output.shard(name).__delitem__(name)


def consistently(bug: Bug) -> Bug:
    """The same with an index that was written to match."""

    def both(output: Output) -> None:
        bug(output)
        assert output.index is not None
        output.index["weight_map"] = {name: file for file, shard in output.shards.items() for name in shard}
        total = sum(array.nbytes for shard in output.shards.values() for _, array in shard.values())
        output.index["metadata"]["total_size"] = total

    return both


def add(name: str, like: str) -> Bug:
    return lambda output: output.shard(like).__setitem__(name, output.shard(like)[like])


def rename(name: str, to: str) -> Bug:
    return lambda output: output.shard(name).__setitem__(to, output.shard(name).pop(name))


def swap(one: str, two: str) -> Bug:
    def swapped(output: Output) -> None:
        first, second = output.shard(one), output.shard(two)
        first[one], second[two] = second[two], first[one]

    return swapped


def in_two_shards(output: Output) -> None:
    other = next(shard for shard in output.shards.values() if PACKED not in shard)
    other[PACKED] = output.shard(PACKED)[PACKED]


def of_index(change: Callable[[dict[str, Any]], Any]) -> Bug:
    def changed(output: Output) -> None:
        assert output.index is not None
        change(output.index)

    return changed


def index_without_file(output: Output) -> None:
    output.index = None


def another_file(index: dict[str, Any]) -> None:
    files = set(index["weight_map"].values())
    index["weight_map"][PACKED] = next(iter(files - {index["weight_map"][PACKED]}))


BUGS: dict[str, Bug] = {
    # codes
    "nibbles of a byte swapped": edit(PACKED, nibbles(lambda c: c.reshape(8, -1, 2)[..., ::-1].reshape(8, -1))),
    "nibbles in AWQ's order": edit(
        PACKED, nibbles(lambda c: c.reshape(8, -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(8, -1))
    ),
    "bytes of a word swapped": edit(PACKED, lambda a: a.byteswap()),
    "zero off by one": edit(PACKED, nibbles(lambda c: (c - 1) & 15)),
    "codes stored signed": edit(PACKED, nibbles(lambda c: c ^ 8)),
    "codes negated": edit(PACKED, nibbles(lambda c: (16 - c) & 15)),
    "one code wrong": edit(PACKED, nibbles(lambda c: np.where(np.arange(64) == 63, c ^ 1, c))),
    "codes clipped to -7..7": edit(PACKED, nibbles(lambda c: np.maximum(c, 1))),
    "codes shifted by a column": edit(PACKED, nibbles(lambda c: np.roll(c, 1, axis=1))),
    "packed along the rows": edit(PACKED, nibbles(lambda c: c.reshape(64, 8).T)),
    "packed transposed": edit(PACKED, lambda a: a.T),
    "packed flattened": edit(PACKED, lambda a: a.reshape(-1)),
    "packed rows rolled": edit(PACKED, lambda a: np.roll(a, 1, axis=0)),
    "a row dropped": edit(PACKED, lambda a: a[:-1]),
    "a row doubled": edit(PACKED, lambda a: np.concatenate([a, a[-1:]])),
    "first row lost, last row twice": edit(PACKED, lambda a: np.concatenate([a[1:], a[-1:]])),
    "last word truncated": edit(ODD_PACKED, lambda a: a[:, :-1]),
    "last word zero": edit(ODD_PACKED, lambda a: a * (np.arange(4) < 3).astype("<i4")),
    "one word too many": edit(ODD_PACKED, lambda a: np.pad(a, ((0, 0), (0, 1)))),
    "ten 3-bit codes in a word": edit(ODD_PACKED, ten_per_word),
    "packed never written": edit(PACKED, np.zeros_like),
    "a bit of packed flipped": edit(PACKED, flip(5)),
    "the last bit of packed flipped": edit(PACKED, flip(8 * 64 * 4 - 1)),
    "packed as int64": edit(PACKED, lambda a: a.astype("<i8"), "I64"),
    "packed called float": edit(PACKED, lambda a: a, "F32"),
    "packed called by a name that does not exist": edit(PACKED, lambda a: a, "I33"),
    "packed of q and k swapped": swap(PACKED, "k.weight_packed"),
    # scales
    "rows of scales swapped": edit(SCALE, lambda a: a[[1, 0, *range(2, 8)]]),
    "groups of scales swapped": edit(SCALE, lambda a: a[:, ::-1]),
    "scales transposed": edit(SCALE, lambda a: a.T),
    "scales transposed in the right shape": edit(SCALE, lambda a: a.T.reshape(8, 2)),
    "scales of one group only": edit(SCALE, lambda a: a[:, :1]),
    "scales without sign": edit(SCALE, lambda a: a & 0x7FFF),
    "scales inverted": edit(SCALE, lambda a: ((1 / as_floats(a)).view("<u4") >> 16).astype("<u2")),
    "fp16 bits called bf16": edit(SCALE, lambda a: as_floats(a).astype("<f2").view("<u2")),
    "scales stored as fp16": edit(SCALE, lambda a: as_floats(a).astype("<f2"), "F16"),
    "scales stored as float32": edit(SCALE, as_floats, "F32"),
    "bf16 bits called fp16": edit(SCALE, lambda a: a, "F16"),
    "scales stored as integers": edit(SCALE, lambda a: a.view("<i2"), "I16"),
    "a scale off by its last bit": edit(SCALE, flip(0)),
    "a NaN scale": edit(SCALE, put(3, 1, 0x7FC0)),
    "an infinite scale": edit(SCALE, put(3, 1, 0x7F80)),
    "a zero scale": edit(SCALE, put(3, 1, 0x0000)),
    "scales of q and k swapped": swap(SCALE, "k.weight_scale"),
    # shapes
    "weight_shape reversed": edit(SHAPE, lambda a: a[::-1]),
    "weight_shape of the packed words": edit(SHAPE, lambda a: np.array([8, 8], "<i8")),
    "weight_shape as int32": edit(SHAPE, lambda a: a.astype("<i4"), "I32"),
    "weight_shape as a row": edit(SHAPE, lambda a: a[None]),
    # copied tensors
    "a bit of a copied tensor flipped": edit("norm.weight", flip(100)),
    "a copied tensor called fp16": edit("norm.weight", lambda a: a, "F16"),
    "a copied tensor through fp16": edit("embed.weight", lambda a: a.astype("<f2").astype("<f4")),
    "a copied tensor in another dtype": edit("norm.weight", as_floats, "F32"),
    "a copied tensor transposed": edit("embed.weight", lambda a: a.T),
    "a copied tensor in another shape": edit("embed.weight", lambda a: a.reshape(4, 6)),
    "a copied scalar as a vector": edit("steps", lambda a: a.reshape(1)),
    "a copied tensor never written": edit("embed.weight", np.zeros_like),
    "a copied tensor cut": edit("embed.weight", lambda a: a[:5]),
    # names and files
    "a missing tensor": consistently(remove(SCALE)),
    "a missing copied tensor": consistently(remove("norm.weight")),
    "a missing tensor that the index names": remove(SCALE),
    "an extra tensor": consistently(add("q.weight_zero_point", PACKED)),
    "an extra dense weight": consistently(add("q.weight", PACKED)),
    "a renamed tensor": consistently(rename(PACKED, "q.qweight")),
    "a tensor in two shards": in_two_shards,
    "a tensor in two shards, index matching": consistently(in_two_shards),
    "the wrong shard in the index": of_index(another_file),
    "a shard in the index that does not exist": of_index(lambda i: i["weight_map"].update({PACKED: "x.safetensors"})),
    "a tensor missing in the index": of_index(lambda i: i["weight_map"].pop(PACKED)),
    "an unknown tensor in the index": of_index(lambda i: i["weight_map"].update({"x": i["weight_map"][PACKED]})),
    "the wrong total size in the index": of_index(lambda i: i["metadata"].update(total_size=1)),
    "an index without weight_map": of_index(lambda i: i.pop("weight_map")),
    "no index": index_without_file,
    "a missing shard": lambda output: output.shards.__delitem__(sorted(output.shards)[0]),
}


@pytest.mark.parametrize("name", BUGS)
def test_verify_catches(original: tuple[Path, Record], tmp_path: Path, name: str) -> None:
    folder, record = original
    output = read(folder)
    BUGS[name](output)
    save(output, tmp_path / "copy")
    with pytest.raises(VerifyError):
        verify_output(tmp_path / "copy", PLAN, record)


@pytest.mark.parametrize("name", ["a NaN scale", "an infinite scale", "a zero scale"])
def test_verify_says_that_a_scale_is_useless(original: tuple[Path, Record], tmp_path: Path, name: str) -> None:
    folder, record = original
    output = read(folder)
    BUGS[name](output)
    save(output, tmp_path / "copy")
    with pytest.raises(VerifyError, match=r"^q\.weight: a scale that is zero or not finite"):
        verify_output(tmp_path / "copy", PLAN, record)


# -- damaged files -------------------------------------------------------------------------------------
def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    base = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:base]), data[base:]


def with_header(change: Callable[[dict[str, Any]], Any], more: bytes = b"") -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        header, data = header_of(file.read_bytes())
        change(header)
        save_file(file, header, data + more)

    return damage


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return damage


def shift(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """The offsets of the tensor that lies last in the file are moved."""

    def shifted(header: dict[str, Any]) -> None:
        last = max((e for name, e in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
        last["data_offsets"] = [last["data_offsets"][0] + begin, last["data_offsets"][1] + end]

    return shifted


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": with_bytes(lambda data: b""),
    "a few bytes": with_bytes(lambda data: data[:5]),
    "cut inside the header": with_bytes(lambda data: data[:40]),
    "cut by a byte": with_bytes(lambda data: data[:-1]),
    "a byte too long": with_bytes(lambda data: data + b"\0"),
    "a header length beyond the file": with_bytes(lambda data: (2**62).to_bytes(8, "little") + data[8:]),
    "a header that is not JSON": with_bytes(lambda data: data[:8] + b"?" + data[9:]),
    "a header that is a list": with_bytes(lambda data: (2).to_bytes(8, "little") + b"[]"),
    "a header entry without a dtype": with_header(lambda header: header[PACKED].pop("dtype")),
    "a header entry that is a number": with_header(lambda header: header.update({PACKED: 3})),
    "offsets moved": with_header(shift(-8, -8), more=b""),
    "a gap": with_header(shift(8, 8), more=b"\0" * 8),
    "a range longer than the tensor": with_header(shift(0, 8), more=b"\0" * 8),
    "two tensors on the same bytes": with_header(lambda header: header.update({PACKED: header["k.weight_packed"]})),
    "zeros": with_bytes(lambda data: bytes(len(data))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_catches_a_file_that_is(tmp_path: Path, name: str) -> None:
    record = write(tmp_path / "out", "compressed-tensors", WEIGHTS, 10**9)
    DAMAGES[name](tmp_path / "out" / "model.safetensors")
    with pytest.raises(VerifyError):
        verify_output(tmp_path / "out", PLAN, record)


def test_verify_catches_a_single_file_of_another_name(tmp_path: Path) -> None:
    record = write(tmp_path / "out", "compressed-tensors", WEIGHTS, 10**9)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "weights.safetensors")
    with pytest.raises(VerifyError):
        verify_output(tmp_path / "out", PLAN, record)


@pytest.mark.parametrize("name", ["q.weight", "norm.weight"])
def test_verify_catches_a_tensor_that_was_never_recorded(original: tuple[Path, Record], name: str) -> None:
    folder, record = original
    digests = {key: digest for key, digest in record.digests.items() if key != name}
    with pytest.raises(VerifyError, match=f"^{name}: "):
        verify_output(folder, PLAN, replace(record, digests=digests))


# -- fake ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("bit", [0, 8 * 64 * 16 - 1])
def test_verify_catches_a_flipped_bit_of_a_dense_weight(tmp_path: Path, kind: str, bit: int) -> None:
    spec = spec_of("q", (8, 64), 4, 32, kind)
    record = write(tmp_path / "out", "fake", {spec: weight_of(spec, 0)}, MAX_SHARD)
    output = read(tmp_path / "out")
    edit("q.weight", flip(bit))(output)
    save(output, tmp_path / "copy")
    with pytest.raises(VerifyError, match=r"^q\.weight: "):
        verify_output(tmp_path / "copy", plan_of("fake", (spec,)), record)


def test_verify_catches_dense_weights_that_overflow_their_dtype(tmp_path: Path) -> None:
    spec = replace(Q, dtype=torch.float16)
    weight = QuantizedWeight(torch.full(Q.shape, -8, dtype=torch.int8), torch.full((8, 2), 8192.0), Q.scheme)
    assert torch.isinf(weight.dequantize(torch.float16)).all()
    with pytest.raises(VerifyError, match="not finite"):
        write(tmp_path / "out", "fake", {spec: weight}, MAX_SHARD)
    assert not list(tmp_path.iterdir())


# -- every format that holds codes ---------------------------------------------------------------------
def flipped(position: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[position] ^= 1

    return change


def rolled(count: int) -> Callable[[bytearray], None]:
    """All elements of `count` bytes moved on by one."""

    def change(data: bytearray) -> None:
        data[:] = data[-count:] + data[:-count]

    return change


def mirrored(data: bytearray) -> None:
    data.reverse()


DAMAGES_OF_BYTES: dict[str, Callable[[bytearray], None]] = {
    "first bit": flipped(0),
    "last byte": flipped(-1),
    "middle": flipped(7),
    "a minimum's last bit": flipped(2),  # in Q4_1
    "moved by 2 bytes": rolled(2),
    "moved by 4 bytes": rolled(4),
    "moved by 18 bytes": rolled(18),  # a block of Q4_0
    "moved by 48 bytes": rolled(48),  # a row of 96 codes of 4 bits
    "reversed": mirrored,
    "zeros": lambda data: data.__setitem__(slice(None), bytes(len(data))),
}


@pytest.mark.parametrize("damage", DAMAGES_OF_BYTES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format_name", ["gptq", "awq", "mlx", "gguf"])
def test_verify_catches_damage_to_every_tensor_of(
    format_name: str, symmetric: bool, damage: str, tmp_path: Path
) -> None:
    spec = replace(spec_of("q", (64, 96), 4, 32), scheme=QuantScheme(4, 32, symmetric))
    weight = weight_of(replace(spec, scheme=QuantScheme(4, 32)), 1)
    if not symmetric:
        if format_name in ("gptq", "mlx"):
            return  # they refuse it
        zeros = torch.randint(-8, 8, (64, 3), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
        weight = QuantizedWeight(weight.codes_OI, weight.scales_OG, spec.scheme, zeros)
    record, plan = write(tmp_path / "out", format_name, {spec: weight}, 10**9), plan_of(format_name, (spec,))
    file = tmp_path / "out" / "model.safetensors"
    original = file.read_bytes()
    header, _ = header_of(original)
    base = 8 + int.from_bytes(original[:8], "little")
    for name in FORMATS[format_name].layout(spec):
        begin, end = header[name]["data_offsets"]
        part = bytearray(original[base + begin : base + end])
        DAMAGES_OF_BYTES[damage](part)
        if bytes(part) == original[base + begin : base + end]:
            continue  # constant zeros stay what they are when they are moved
        file.write_bytes(original[: base + begin] + part + original[base + end :])
        with pytest.raises(VerifyError, match=r"^q\.weight: "):
            verify_output(tmp_path / "out", plan, record)
    file.write_bytes(original)
    verify_output(tmp_path / "out", plan, record)
