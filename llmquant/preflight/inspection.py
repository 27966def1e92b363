"""What a checkpoint is: schemes and sizes by kind of tensor, and the statistics of one layer."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint import PackedSource, bits_per_weight, open_checkpoint
from llmquant.errors import SourceError, did_you_mean, option
from llmquant.quant.grid import QuantScheme
from llmquant.source.base import Source
from llmquant.source.names import natural_key, without_numbers


@dataclass(frozen=True)
class _Kind:
    name: str
    shape: tuple[int, ...]
    scheme: QuantScheme | None
    form: str  # of what is packed, but no grid
    dtypes: str  # of the stored tensors


def inspect_checkpoint(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Identity, sizes and one row per kind of tensor, from headers. SourceError as for `open_checkpoint`."""
    source = open_checkpoint(model, revision)
    counts, sizes = Counter[_Kind](), Counter[_Kind]()
    for name in sorted(source.tensors, key=natural_key):
        info, stored = source.tensors[name], source.parts(name)
        dtypes = " + ".join(dict.fromkeys(_short(part.dtype) for part in stored))
        kind = _Kind(without_numbers(name), info.shape, _scheme(source, name), _form(source, name), dtypes)
        counts[kind] += 1
        sizes[kind] += sum(part.nbytes for part in stored)
    return {
        "model": source.name,
        "revision": source.revision,
        "model_type": source.config.get("model_type"),
        "quantized": isinstance(source, PackedSource),
        "weights": sum(info.numel for info in source.tensors.values()),
        "bytes": source.weight_bytes,
        "files": len({part.file for name in source.tensors for part in source.parts(name)}),
        "bits_per_weight": bits_per_weight(source),
        "kinds": [
            {
                "name": kind.name,
                "count": count,
                "shape": list(kind.shape),
                "stored": kind.dtypes,
                "bytes": sizes[kind],
                "bits_per_weight": 8 * sizes[kind] / max(1, count * math.prod(kind.shape)),
                "scheme": _scheme_dict(kind.scheme),
                "form": kind.form,
            }
            for kind, count in counts.items()
        ],
    }


def inspect_layer(model: str | Path, layer: str, revision: str | None = None) -> dict[str, Any]:
    """Statistics of one tensor, by its name or its module's; of codes and scales where it is quantized."""
    source = open_checkpoint(model, revision)
    name = layer if layer in source.tensors else f"{layer}.weight"
    if name not in source.tensors:
        raise SourceError(
            f"{option('layer')} {layer}", f"not in {source.name}", remedy=did_you_mean_long(layer, source)
        )
    info, scheme = source.tensors[name], _scheme(source, name)
    data: dict[str, Any] = {
        "name": name,
        "shape": list(info.shape),
        "scheme": _scheme_dict(scheme),
        "form": _form(source, name),
        "stored": [
            {"name": part.name, "dtype": _short(part.dtype), "shape": list(part.shape), "bytes": part.nbytes}
            for part in source.parts(name)
        ],
        "values": _spread(source.read(name)),
    }
    if scheme is not None and isinstance(source, PackedSource) and (read := source.packed[name].grid) is not None:
        grid = read(source.stored.read)
        data |= {"codes": code_statistics(grid.codes_OI, scheme), "scales": _spread(grid.scales_OG)}
        if grid.zeros_OG is not None:
            data["zeros"] = _spread(grid.zeros_OG)
    return data


def did_you_mean_long(layer: str, source: Source) -> str:
    """As `did_you_mean`, without a list of thousands of names."""
    remedy = did_you_mean(layer, source.tensors)
    return (
        remedy
        if remedy.startswith("did")
        else f"`llmquant inspect` without {option('layer')} lists the kinds of tensors"
    )


def code_statistics(codes_OI: Tensor, scheme: QuantScheme) -> dict[str, Any]:
    """How often each code occurs, the share at both ends of the range, and the entropy in bits."""
    counts = torch.bincount(codes_OI.flatten().long() - scheme.code_min, minlength=2**scheme.bits)
    share = counts.double() / counts.sum()
    used = share[share > 0]
    return {
        "histogram": {str(code): count for code, count in enumerate(counts.tolist(), scheme.code_min)},
        "at_ends": float(share[0] + share[-1]),
        "zero": float(share[-scheme.code_min]),
        "entropy_bits": float(-(used * used.log2()).sum()),
    }


def _spread(values: Tensor) -> dict[str, Any]:
    """Count, extremes, quartiles, mean and deviation of the finite values, and how many are negative, zero or not
    finite."""
    flat = values.double().flatten()
    finite = flat[torch.isfinite(flat)].sort().values
    spread: dict[str, Any] = {"count": flat.numel(), "nonfinite": flat.numel() - finite.numel()}
    if not finite.numel():
        return spread
    last = finite.numel() - 1
    quartiles = {key: float(finite[round(q * last)]) for key, q in (("p25", 0.25), ("median", 0.5), ("p75", 0.75))}
    return spread | {
        "negative": int((finite < 0).sum()),
        "zero": int((finite == 0).sum()),
        "min": float(finite[0]),
        **quartiles,
        "max": float(finite[-1]),
        "mean": float(finite.mean()),
        "std": float(finite.std(correction=0)),
    }


def _form(source: Source, name: str) -> str:
    """What a packed tensor is that is no integer grid: FP8, NF4; "" for all others."""
    return source.packed[name].form if isinstance(source, PackedSource) and name in source.packed else ""


def _scheme(source: Source, name: str) -> QuantScheme | None:
    """None for dense tensors, and for codes that are no integer grid (NF4)."""
    if not isinstance(source, PackedSource) or name not in source.packed or source.packed[name].grid is None:
        return None
    linear = source.packed[name]
    group = linear.group_size or (-1 if linear.n_groups == 1 else linear.shape[1] // linear.n_groups)
    return QuantScheme(linear.bits, group, linear.symmetric)


def _scheme_dict(scheme: QuantScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
