"""Tensors -> safetensors files of at most a given size, and the index that says which file holds which tensor."""

from dataclasses import dataclass
from typing import Any

import torch

from llmquant.formats.base import Layout
from llmquant.source.header import TensorInfo, build_header

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file: its name, its first bytes (length and header), and where its tensors lie."""

    file: str
    head: bytes
    places: dict[str, TensorInfo]


def lay_out_shards(layout: Layout, max_bytes: int) -> tuple[list[Shard], dict[str, Any] | None]:
    """The files for `layout`, in its order, and the content of INDEX, which is None where one file is enough."""
    split = split_shards(layout, max_bytes)
    shards = []
    for i, names in enumerate(split, 1):
        file = "model.safetensors" if len(split) == 1 else f"model-{i:05d}-of-{len(split):05d}.safetensors"
        shards.append(Shard(file, *build_header({name: layout[name] for name in names})))
    if len(shards) == 1:
        return shards, None
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    total = sum(place.nbytes for shard in shards for place in shard.places.values())
    return shards, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def split_shards(layout: Layout, max_bytes: int) -> list[list[str]]:
    """Names of tensors, shard by shard, in order. A tensor larger than `max_bytes` gets a shard of its own.

    >>> split_shards({"a": (torch.int8, (6,)), "b": (torch.int8, (6,)), "c": (torch.int8, (4,))}, 10)
    [['a'], ['b', 'c']]
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
