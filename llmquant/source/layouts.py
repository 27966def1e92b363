"""The quantized linears of a finished checkpoint, ours or other people's, in the layouts that exist.

Each function finds the packed linears of one layout among the stored tensors and says how to read them. Most layouts
hold grids, w = (code - zero) * scale. bitsandbytes NF4 holds indexes into a table of 16 numbers and has only a dense
view. A new layout is one function and one line in LAYOUTS.

Shapes: O out_features, I in_features, G groups in a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.formats.awq import unpack_awq
from llmquant.formats.packing import unpack_rows
from llmquant.source.header import TensorInfo
from llmquant.source.quant_state import MARK, QuantState, read_state
from llmquant.source.stated import ConfigGroups, Dynamic, own_entries, refuse_transforms, stated_bits

Read = Callable[[str], Tensor]
Tensors = dict[str, TensorInfo]


@dataclass(frozen=True)
class Grid:
    """w[o, i] = (codes_OI[o, i] - zeros_OG[o, g]) * scales_OG[o, g] with g = group_I[i].

    Without group_I, groups are neighbours: g = i // (I / G). Without zeros_OG, zeros are 0. Codes and zeros are signed
    (formats store them with 2^(bits-1) added) and exact in float32.

    >>> Grid(torch.tensor([[-8, 7, 1, 0]]), torch.tensor([[0.5, 2.0]])).dense().tolist()
    [[-4.0, 3.5, 2.0, 0.0]]
    """

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None = None
    group_I: Tensor | None = None

    def dense(self) -> Tensor:
        group_I, in_features = self.group_I, self.codes_OI.shape[1]
        if group_I is None:
            group_I = torch.arange(in_features) // (in_features // self.scales_OG.shape[1])
        weight_OI = self.codes_OI.float()
        if self.zeros_OG is not None:
            weight_OI = weight_OI.sub_(self.zeros_OG.float()[:, group_I])
        return weight_OI.mul_(self.scales_OG.float()[:, group_I])


@dataclass(frozen=True)
class PackedLinear:
    """One packed linear.

    prefix   of the names of its stored tensors, without the last dot
    shape    of the weight that it holds
    dtype    that the checkpoint is said to have for this weight: that of its scales
    bits     of a code; 0 if the codes are no integer grid: `form` says then what they are
    parts    names of the stored tensors that it is made of
    grid     reads codes, scales and zeros; None if it has no grid
    dense    reads the dequantized weight
    """

    prefix: str  # of the stored names, without a dot
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    n_groups: int
    symmetric: bool
    parts: tuple[str, ...]
    grid: Callable[[Read], Grid] | None
    dense: Callable[[Read], Tensor]
    form: str = ""
    group_size: int = 0  # as the config says: -1 for a whole row; 0 where it does not, n_groups then decides
    said: Callable[[Read], str] | None = None  # reads what must be said of how it is read; "" for nothing


def _linear(
    prefix: str,
    shape: tuple[int, int],
    scales: TensorInfo,
    bits: int,
    n_groups: int,
    parts: tuple[str, ...],
    grid: Callable[[Read], Grid],
    *,
    symmetric: bool,
    group_size: Any = None,
    said: Callable[[Read], str] | None = None,
) -> PackedLinear:
    """`group_size` as the config says it, whatever that is: what does not fit the scales is not believed."""
    names = tuple(f"{prefix}.{part}" for part in parts)
    fits = type(group_size) is int and (group_size == shape[1] / max(1, n_groups) or (group_size, n_groups) == (-1, 1))
    stated = group_size if fits else 0
    dense = partial(_dense, grid)
    return PackedLinear(
        *(prefix, shape, scales.dtype, bits, n_groups, symmetric, names, grid, dense), group_size=stated, said=said
    )


def _dense(grid: Callable[[Read], Grid], read: Read) -> Tensor:
    return grid(read).dense()


def _with(tensors: Tensors, leaf: str, *parts: str) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Every module with a tensor `leaf`: its name, that tensor and its `parts`. SourceError if one is missing."""
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if last == leaf:
            for part in parts:
                if f"{prefix}.{part}" not in tensors:
                    raise SourceError(prefix, f"no {part} beside {leaf}")
            yield prefix, [tensors[f"{prefix}.{part}"] for part in (leaf, *parts)]


def _require(fits: bool, prefix: str, shape: object, *infos: TensorInfo) -> None:
    if not fits:
        got = ", ".join(f"{info.name.rpartition('.')[2]} {info.shape}" for info in infos)
        raise SourceError(prefix, got, expected=f"a packing of {shape}")


def _signed(codes: Tensor, bits: int) -> Tensor:
    shifted: Tensor = codes.short() - (1 << (bits - 1))
    return shifted


def compressed_tensors(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """compressed-tensors, pack-quantized, with any number of config groups. Bits are those of the group that names a
    linear: words of a row do not tell them, as 20 weights of 3 bits and of 4 take as many. The group size follows from
    the shapes where no group states it.
    """
    refuse_transforms(config)
    if config.get("format") != "pack-quantized":
        raise SourceError(
            "quantization_config",
            f"compressed-tensors format {config.get('format')!r}",
            expected="pack-quantized, float-quantized or mxfp4-pack-quantized",
        )
    found, groups = {}, ConfigGroups(config)
    for prefix, (packed, scale, shape_info) in _with(tensors, "weight_packed", "weight_scale", "weight_shape"):
        shape = _stored_shape(read(shape_info.name), prefix)
        rows, columns = shape
        stated = groups.find(prefix)
        if stated.get("type", "int") != "int" or stated.get("num_bits") is None:
            got = f"{stated.get('num_bits')} bits of type {stated.get('type')} by config_groups"
            raise SourceError(prefix, got, expected="a number of bits of type int")
        bits = stated_bits(stated["num_bits"], prefix)
        fits = packed.shape == (rows, -(-columns * bits // 32))
        fits = fits and len(scale.shape) == 2 and scale.shape[0] == rows and columns % max(1, scale.shape[1]) == 0
        _require(fits, prefix, shape, packed, scale)
        zero, order = (tensors.get(f"{prefix}.weight_{part}") for part in ("zero_point", "g_idx"))
        if zero is not None:
            words = (-(-rows * bits // 32), scale.shape[1])
            _require(zero.shape in (words, scale.shape), prefix, shape, zero, scale)
        parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
        parts += ("weight_zero_point",) * (zero is not None) + ("weight_g_idx",) * (order is not None)
        grid = _compressed_grid(prefix, shape, bits, zero, order)
        found[f"{prefix}.weight"] = _linear(
            *(prefix, shape, scale, bits, scale.shape[1], parts, grid),
            symmetric=zero is None,
            group_size=-1 if stated.get("strategy") == "channel" else stated.get("group_size"),
        )
    return found


def _stored_shape(shape: Tensor, prefix: str) -> tuple[int, int]:
    if shape.shape != (2,) or int(shape.min()) < 1:
        raise SourceError(prefix, f"weight_shape {shape.tolist()}", expected="[out_features, in_features]")
    return int(shape[0]), int(shape[1])


def _compressed_grid(
    prefix: str, shape: tuple[int, int], bits: int, zero: TensorInfo | None, order: TensorInfo | None
) -> Callable[[Read], Grid]:
    def grid(read: Read) -> Grid:
        zeros = None
        if zero is not None:
            zeros = read(zero.name)
            if zero.dtype == torch.int32:  # packed along the rows
                zeros = _signed(unpack_rows(zeros.T, bits, shape[0]).T, bits)
        group_I = None if order is None else read(order.name).long()
        codes = unpack_rows(read(f"{prefix}.weight_packed"), bits, shape[1])
        return Grid(_signed(codes, bits), read(f"{prefix}.weight_scale"), zeros, group_I)

    return grid


def gptq(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """GPTQ, v1 and v2. In v1 the stored zeros are one too small. g_idx names each input's group; `dynamic` overrides
    bits and group size of modules by patterns.

    Many symmetric uploads have the zeros of the other version than their label says. Zeros of a symmetric grid are
    known: those that are right by the other version are read so, and it is said.
    """
    refuse_transforms(config)
    version = config.get("checkpoint_format", "gptq")
    if config.get("bits") not in (2, 3, 4, 8) or version not in ("gptq", "gptq_v2"):
        raise SourceError(
            "quantization_config",
            f"gptq checkpoint_format {version!r}, {config.get('bits')} bits",
            expected="gptq or gptq_v2, 2, 3, 4 or 8 bits",
        )
    found, dynamic = {}, Dynamic(config)
    for prefix, (qweight, qzeros, scales) in _with(tensors, "qweight", "qzeros", "scales"):
        order = tensors.get(f"{prefix}.g_idx")
        stated = config | dynamic.find(prefix)
        bits = stated_bits(stated["bits"], prefix)
        _require(len(qweight.shape) == len(scales.shape) == 2, prefix, "two dimensions", qweight, scales)
        rows = qweight.shape[1]
        columns = order.shape[0] if order is not None else qweight.shape[0] * 32 // bits
        fits = qweight.shape[0] == -(-columns * bits // 32) and scales.shape[1] == rows
        fits = fits and qzeros.shape == (scales.shape[0], -(-rows * bits // 32))
        fits = fits and (order is not None or columns % max(1, scales.shape[0]) == 0)
        _require(fits, prefix, (rows, columns), qweight, qzeros, scales)
        symmetric, old = stated.get("sym") is True, version == "gptq"
        grid = _gptq_grid(prefix, (rows, columns), bits, old, order, symmetric=symmetric)
        parts = ("qweight", "qzeros", "scales") + (("g_idx",) if order is not None else ())
        found[f"{prefix}.weight"] = _linear(
            prefix,
            (rows, columns),
            scales,
            bits,
            scales.shape[0],
            parts,
            grid,
            symmetric=bool(stated.get("sym", True)),
            group_size=stated.get("group_size"),
            said=partial(_said_of_zeros, prefix, bits, rows, old) if symmetric else None,
        )
    return found


def _gptq_zeros(read: Read, prefix: str, bits: int, rows: int, old: bool) -> Tensor:
    """Signed zeros as the label says: one more than is stored in the old version."""
    zeros: Tensor = _signed(unpack_rows(read(f"{prefix}.qzeros"), bits, rows), bits) + int(old)
    return zeros


def _said_of_zeros(prefix: str, bits: int, rows: int, old: bool, read: Read) -> str:
    if not _gptq_zeros(read, prefix, bits, rows, old).any():
        return ""
    label, other = ("gptq", "gptq_v2") if old else ("gptq_v2", "gptq")
    return f"checkpoint_format is {label}, but the zeros of its symmetric grids are those of {other}: read as {other}"


def _gptq_grid(
    prefix: str, shape: tuple[int, int], bits: int, old: bool, order: TensorInfo | None, *, symmetric: bool
) -> Callable[[Read], Grid]:
    def grid(read: Read) -> Grid:
        codes = _signed(unpack_rows(read(f"{prefix}.qweight").T, bits, shape[1]), bits)
        zeros = _gptq_zeros(read, prefix, bits, shape[0], old)
        if symmetric and zeros.any():
            low, high, other = int(zeros.min()), int(zeros.max()), 1 if old else -1
            if (low, high) != (other, other):
                raise SourceError(
                    f"{prefix}.qzeros",
                    f"zeros from {low} to {high} in grids that the config calls symmetric",
                    expected="0 everywhere",
                    remedy='where they are meant, set "sym": false in its quantization_config',
                )
            zeros = torch.zeros_like(zeros)
        group_I = None if order is None else read(order.name).long()
        if group_I is not None and bool(((group_I < 0) | (group_I >= zeros.shape[0])).any()):
            raise SourceError(f"{prefix}.g_idx", "a group that does not exist", expected=f"0 to {zeros.shape[0] - 1}")
        return Grid(codes, read(f"{prefix}.scales").T, zeros.T, group_I)

    return grid


def awq(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """AWQ, version gemm: the only one that is read."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits")
    if version != "gemm" or bits != 4:
        raise SourceError("quantization_config", f"awq version {version!r}, {bits} bits", expected="gemm, 4 bits")
    found = {}
    for prefix, (qweight, qzeros, scales) in _with(tensors, "qweight", "qzeros", "scales"):
        _require(len(qweight.shape) == len(scales.shape) == 2, prefix, "two dimensions", qweight, scales)
        rows, columns = qweight.shape[1] * 8, qweight.shape[0]
        fits = scales.shape[1] == rows and qzeros.shape == (scales.shape[0], rows // 8)
        _require(fits and columns % max(1, scales.shape[0]) == 0, prefix, (rows, columns), qweight, qzeros, scales)

        def grid(read: Read, prefix: str = prefix) -> Grid:
            codes, zeros = (_signed(unpack_awq(read(f"{prefix}.{part}")), 4).T for part in ("qweight", "qzeros"))
            return Grid(codes, read(f"{prefix}.scales").T, zeros)

        found[f"{prefix}.weight"] = _linear(
            prefix,
            (rows, columns),
            scales,
            4,
            scales.shape[0],
            ("qweight", "qzeros", "scales"),
            grid,
            symmetric=False,
            group_size=config.get("group_size"),
        )
    return found


def mlx(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """MLX affine: w = u s + bias, u unsigned. Bits and group sizes stand in the config, for all or for a module."""
    found, own = {}, own_entries(config)
    for prefix, (scales, biases, weight) in _with(tensors, "scales", "biases", "weight"):
        stated = config | (own.find(prefix) or {})
        if stated.get("mode", "affine") != "affine":
            raise SourceError(prefix, f"mlx mode {stated['mode']!r}", expected="affine")
        group, bits = stated.get("group_size"), stated_bits(stated.get("bits"), prefix)
        if not isinstance(group, int) or not bits:
            raise SourceError(
                prefix, f"group_size {group!r}, bits {stated.get('bits')!r} in the config", expected="numbers"
            )
        _require(len(weight.shape) == len(scales.shape) == 2, prefix, "a matrix", weight, scales)
        shape = (scales.shape[0], scales.shape[1] * group)
        fits = weight.shape == (shape[0], shape[1] * bits // 32) and biases.shape == scales.shape
        _require(fits, prefix, shape, weight, scales, biases)

        def dense(read: Read, prefix: str = prefix, shape: tuple[int, int] = shape, bits: int = bits) -> Tensor:
            codes = unpack_rows(read(f"{prefix}.weight").view(torch.int32), bits, shape[1]).float()
            scales, biases = (read(f"{prefix}.{part}").float()[..., None] for part in ("scales", "biases"))
            product: Tensor = codes.view(*scales.shape[:2], -1) * scales + biases
            return product.view(shape)

        parts = tuple(f"{prefix}.{part}" for part in ("weight", "scales", "biases"))
        found[f"{prefix}.weight"] = PackedLinear(
            *(prefix, shape, scales.dtype, bits, scales.shape[1], False, parts, None, dense), group_size=group
        )
    return found


def from_table(octets: Tensor, table: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """table[code] * absmax of the code's block, in float32, for all codes in `octets`: the upper half of a byte first.

    >>> from_table(torch.tensor([0x01], dtype=torch.uint8), torch.tensor([0.0, 1.0]), torch.tensor([3.0]), 64).tolist()
    [0.0, 3.0]
    """
    octets = octets.reshape(-1).view(torch.uint8)
    codes = torch.stack([octets >> 4, octets & 15], dim=-1).view(-1).long()
    return table.float()[codes].mul_(absmax.float().repeat_interleave(blocksize)[: len(codes)])


def bitsandbytes(tensors: Tensors, config: dict[str, Any], read: Read) -> dict[str, PackedLinear]:
    """bitsandbytes NF4 and FP4: codes of 4 bits are indexes into a table, and each block of them has a scale.

    The first code of a byte is in its upper half. With double quantization the scales are 8-bit codes themselves:
    table[code] * scale of the outer block + offset.
    """
    found: dict[str, PackedLinear] = {}
    for name in tensors:
        stem, mark, _ = name.rpartition(MARK)
        if not mark:
            continue
        if stem in found:
            raise SourceError(name, "is a second quant_state of its weight")
        state = read_state(name, tensors, read)

        def dense(read: Read, stem: str = stem, state: QuantState = state) -> Tensor:
            absmax = read(f"{stem}.absmax")
            if state.nested is not None:
                table = read(f"{stem}.nested_quant_map").float()[absmax.long()]
                outer = read(f"{stem}.nested_absmax").float()
                absmax = table * outer.repeat_interleave(state.nested.blocksize)[: len(table)]
                absmax = absmax + state.nested.offset
            table = read(f"{stem}.quant_map")
            values = from_table(read(stem), table, absmax, state.blocksize)
            return values[: math.prod(state.shape)].view(state.shape)

        form = f"{state.kind}, blocks of {state.blocksize}"
        prefix = stem.rpartition(".")[0]
        found[stem] = PackedLinear(prefix, state.shape, state.dtype, 0, 0, True, state.parts, None, dense, form)
    if not found:
        raise SourceError("quantization_config", "bitsandbytes without 4-bit tensors", expected="NF4 or FP4")
    return found


# By quant_method in the config, as the tools that wrote it spell it; not every one is a format of ours.
LAYOUTS: dict[str, Callable[[Tensors, dict[str, Any], Read], dict[str, PackedLinear]]] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "mlx": mlx,
    "bitsandbytes": bitsandbytes,
}
