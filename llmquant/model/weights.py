"""The parameters of a model that was built without memory: read from the checkpoint, put in, and freed by name.

Where a weight lies (device) and in which dtype it is computed with are decided here and nowhere else.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.ahead import ahead, n_workers
from llmquant.model.meta import dtype_plan
from llmquant.model.names import find_ties
from llmquant.source.base import Source

# What a parameter is given: a tensor in the module's own layout, or what makes it whenever it is used.
Value = Tensor | Callable[[], Tensor]


class Weights:
    """All parameters and persistent buffers of `model`, on the meta device except while they are loaded.

    Parameters that are `on_demand` lie in the module only while it uses them (`present`): once loaded, it is known how
    they are made. That is for experts, where all of a block would fill the memory.

    names      all of them, as the model calls them
    modules    all modules of the model by their names, those that several share by each of them
    param_of   tensor name in the checkpoint -> name in the model, for those the model knows
    tied       parameters that the checkpoint holds only under another parameter's name -> that name
    borrowers  the other way round: name -> parameters that the checkpoint holds only under it
    on_demand  parameters that are made whenever they are used
    """

    def __init__(
        self, model: Any, source: Source, param_of: dict[str, str], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.source = device, dtype, source
        self.modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self.names: list[str] = list(model.state_dict())
        self.param_of = param_of
        self.tied = find_ties(model, set(self.param_of.values()), source)
        self.borrowers: dict[str, list[str]] = {}
        for borrower, owner in self.tied.items():
            self.borrowers.setdefault(owner, []).append(borrower)
        self.on_demand: set[str] = set()
        self._makers: dict[str, Callable[[], Tensor]] = {}
        self._coming: dict[str, Future[Tensor]] = {}  # what is read already, or will be
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
        """Read `names` and put them in, in the compute dtype (or the dtype that the model insists on).

        For an accelerator, which else would wait for its weights, threads read some of them at once, or have read them
        before (`read_ahead`).
        """
        names = list(names)
        now = [name for name in names if name not in self.on_demand]

        def read(name: str) -> Tensor:
            coming = self._coming.pop(name, None)
            return self.read(name) if coming is None else coming.result()

        for name, tensor in zip(now, ahead(read, now) if self._in_threads else map(read, now), strict=True):
            self.put(name, self._placed(name, tensor))
        for name in names:
            if name in self.on_demand:
                self.put(name, partial(self._read_in, name))

    @property
    def _in_threads(self) -> bool:
        return self.device.type != "cpu" and self.source.in_parallel

    def read_ahead(self, names: Iterable[str]) -> None:
        """Read what is loaded next while an accelerator works on what is loaded now. A CPU works with all its cores,
        and waits less for its memory."""
        if self._in_threads:
            now = [name for name in names if name not in self.on_demand]
            self._coming = {name: self._readers.submit(self.read, name) for name in now}

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(n_workers(), thread_name_prefix="llmquant-weights")

    def _read_in(self, name: str) -> Tensor:
        return self._placed(name, self.read(name))

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.compute_dtype(name) if tensor.is_floating_point() else tensor.dtype)

    def free(self, names: Iterable[str]) -> None:
        """Give the memory of `names` back. Computed buffers (rope tables) are not among them and stay."""
        for name in names:
            if self._makers.pop(name, None) is None:
                self._set(name, torch.empty_like(self._there(name), device="meta"))

    @contextmanager
    def loaded(self, names: Sequence[str], instead: Mapping[str, Value] = MappingProxyType({})) -> Iterator[None]:
        """`names` in memory for the length of a `with`; those in `instead` are given that, and not read."""
        try:
            self.load(name for name in names if name not in instead)
            for name, value in instead.items():
                self.place(name, value)
            yield
        finally:
            self.free(names)

    @contextmanager
    def holding(self, weights: Mapping[str, Value]) -> Iterator[None]:
        """`weights`, by name, in place of what is there for the length of a `with`."""
        before = {name: self.value(name) for name in weights}
        try:
            for name, weight in weights.items():
                self.put(name, weight)
            yield
        finally:
            for name, weight in before.items():
                self.put(name, weight)

    @contextmanager
    def present(self, names: Sequence[str]) -> Iterator[None]:
        """Parameters that are made on demand in their module for the length of a `with`."""
        made = [name for name in names if name in self._makers]
        empty = {name: self._there(name) for name in made}
        try:
            for name in made:
                self._set(name, self._makers[name]())
            yield
        finally:
            for name, value in empty.items():
                self._set(name, value)

    def get(self, name: str) -> Tensor:
        """A parameter or buffer, made if it must be."""
        value = self.value(name)
        return value if isinstance(value, Tensor) else value()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter or buffer, wherever it is."""
        return tuple(self._there(name).shape)

    def value(self, name: str) -> Value:
        """What a parameter or buffer was given."""
        return self._makers.get(name) or self._there(name)

    def put(self, name: str, value: Value) -> None:
        """Replace one parameter or buffer by a tensor of the same shape, or by what makes one."""
        if isinstance(value, Tensor):
            self._makers.pop(name, None)
            self._set(name, value)
        else:
            self._makers[name] = value

    def place(self, name: str, value: Value) -> None:
        """`put` on the device and in the compute dtype. What makes a tensor is called now, unless that is on demand."""
        if not isinstance(value, Tensor):
            if name in self.on_demand:
                return self.put(name, value)
            value = value()
        self.put(name, value.to(self.device, self.compute_dtype(name)))

    def _there(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.modules[path], leaf)
        return value

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def is_strict(self, name: str) -> bool:
        """Whether the model insists on float32 for a parameter, whatever the others are in."""
        return any(dtype == torch.float32 and re.search(p, name) for p, dtype in self._strict.items())

    def compute_dtype(self, name: str) -> torch.dtype:
        """The compute dtype, or the one that the model insists on for this parameter."""
        return next((dtype for pattern, dtype in self._dtype_plan.items() if re.search(pattern, name)), self.dtype)
