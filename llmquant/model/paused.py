"""Forwards of a block that pause where a linear reads its input, and continue later, with other weights.

Linears are quantized step by step, and each step wants the inputs that the steps before it give once they are
quantized. A forward that pauses does all of a block's work once; one that is run anew for each step does it up to six
times. Each paused forward is a greenlet: a call stack of its own in the same thread, switched by hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, MappingProxyType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn


class Paused:
    """One forward on its way. Make and resume it only within `pausing` of the modules that it is to pause at.

    `around` is entered whenever it continues and left whenever it pauses: settings of the thread while it runs.
    `outputs` are those of the modules that `pausing` is to keep them of, by their names there.
    """

    def __init__(
        self, forward: Callable[[], Any], around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._run, self._around = _Run(forward), around
        self._at: tuple[int, Any] = (-1, None)

    def input_of(self, position: int) -> Any:
        """Go on up to the module at `position`; the input that it is about to read. Asked again, it stays there."""
        while self._at[0] != position:
            result = self._go_on()
            if self._run.dead:
                raise RuntimeError(f"the block's forward ended before step {position}")
            self._at = result
        return self._at[1]

    def finish(self) -> Any:
        """Go on to the end; what the forward returns."""
        result = self._go_on()
        while not self._run.dead:
            result = self._go_on()
        return result

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        return self._run.outputs

    def _go_on(self) -> Any:
        self._at = (-1, None)
        with self._around():
            return self._run.switch()

    def close(self) -> None:
        """Give up, and free what the forward holds."""
        self._at = (-1, None)
        self._run.throw()

    def held_bytes(self) -> int:
        """Bytes of the tensors that the paused calls hold, and of `outputs`."""
        kept = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in self._run.outputs.values()}
        return sum((held(self._run.gr_frame) | kept).values())


class _Run(greenlet):  # type: ignore[misc] # untyped library
    """A greenlet of ours, so that a hook knows it."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__(forward)
        self.outputs: dict[str, Tensor] = {}


def held(frame: FrameType | None) -> dict[int, int]:
    """Address and bytes of every storage whose tensors a stack of calls holds, parameters left out."""
    storages: dict[int, int] = {}
    while frame is not None:
        for tensor in _tensors(list(frame.f_locals.values())):
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        frame = frame.f_back
    return storages


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping) and len(value) < 64:  # not a module's namespace
            yield from _tensors(list(value.values()))


@contextmanager
def pausing(modules: Sequence[nn.Module], keeping: Mapping[str, nn.Module] = MappingProxyType({})) -> Iterator[None]:
    """While the `with` lasts, forwards in a `Paused` pause before each of `modules`, known by its position, and keep
    the outputs of the modules `keeping`."""

    def hook(position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def pause(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            current = getcurrent()
            if isinstance(current, _Run) and current.parent is not None:
                current.parent.switch((position, inputs[0]))

        return pause

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def kept(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if isinstance(current := getcurrent(), _Run):
                current.outputs[name] = output.clone()  # a block may add to it in place

        return kept

    handles = [module.register_forward_pre_hook(hook(position)) for position, module in enumerate(modules)]
    handles += [module.register_forward_hook(keep(name)) for name, module in keeping.items()]
    try:
        # Around all of them: a paused forward must not leave its own setting behind in the thread.
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
