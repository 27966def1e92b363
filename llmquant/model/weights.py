"""The parameters of a model that was built without memory: read from the checkpoint, put in, and freed by name.

Where a weight lies (device) and in which dtype it is computed with are decided here and nowhere else.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.model.meta import dtype_plan
from llmquant.model.names import find_ties
from llmquant.source.base import Source


class Weights:
    """All parameters and persistent buffers of `model`, on the meta device except while they are loaded.

    names      all of them, as the model calls them
    param_of   tensor name in the checkpoint -> name in the model, for those the model knows
    tied       parameters that the checkpoint holds only under another parameter's name -> that name
    borrowers  the other way round: name -> parameters that the checkpoint holds only under it
    """

    def __init__(
        self, model: Any, source: Source, param_of: dict[str, str], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.source = device, dtype, source
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.names: list[str] = list(model.state_dict())
        self.param_of = param_of
        self.tied = find_ties(model, set(self.param_of.values()), source)
        self.borrowers: dict[str, list[str]] = {}
        for borrower, owner in self.tied.items():
            self.borrowers.setdefault(owner, []).append(borrower)
        self._key_of = {param: key for key, param in self.param_of.items()}
        self._dtype_plan = dtype_plan(model, dtype)
        self._strict = dtype_plan(model, torch.bfloat16)

    def read(self, name: str) -> Tensor:
        """A parameter as the checkpoint holds it; SourceError where it holds NaN or Inf."""
        return self.source.read_finite(self._key(name))

    def prefetch(self, names: Iterable[str]) -> None:
        """Say which parameters will be read next; a source on the Hub fetches their files meanwhile."""
        self.source.prefetch(map(self._key, names))

    def _key(self, name: str) -> str:
        return self._key_of[self.tied.get(name, name)]

    def load(self, names: Iterable[str]) -> None:
        """Read `names` and put them in, in the compute dtype (or the dtype that the model insists on)."""
        for name in names:
            tensor = self.read(name)
            wanted = self._compute_dtype(name) if tensor.is_floating_point() else tensor.dtype
            self.put(name, tensor.to(self.device, wanted))

    def free(self, names: Iterable[str]) -> None:
        """Give the memory of `names` back. Computed buffers (rope tables) are not among them and stay."""
        for name in names:
            self.put(name, torch.empty_like(self.get(name), device="meta"))

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """`names` in memory for the length of a `with`."""
        try:
            self.load(names)
            yield
        finally:
            self.free(names)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """`weights`, by name, in place of what is there for the length of a `with`."""
        before = {name: self.get(name) for name in weights}
        try:
            for name, weight in weights.items():
                self.put(name, weight)
            yield
        finally:
            for name, weight in before.items():
                self.put(name, weight)

    def get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self._modules[path], leaf)
        return value

    def put(self, name: str, value: Tensor) -> None:
        """Replace one parameter or buffer by a tensor of the same shape."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def is_strict(self, name: str) -> bool:
        """Whether the model insists on float32 for a parameter, whatever the others are in."""
        return any(dtype == torch.float32 and re.search(p, name) for p, dtype in self._strict.items())

    def _compute_dtype(self, name: str) -> torch.dtype:
        return next((dtype for pattern, dtype in self._dtype_plan.items() if re.search(pattern, name)), self.dtype)
