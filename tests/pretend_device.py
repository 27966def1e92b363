"""An accelerator to test with where there is none: the device `pretend`, made with torch's own means.

A tensor on it is a wrapper (`PretendTensor`) that says `device="pretend:0"` and holds its numbers in a CPU tensor.
Every operator runs on that CPU tensor, so results are those of the CPU to the bit where the same operators run. It
refuses what an accelerator refuses, and a little more:

- a plain CPU tensor beside one of its own; a scalar (0-dim) may be read, copies may go either way
- `numpy()`, and `data_ptr()`: its address means nothing to code on the CPU
- float64, which some accelerators do not have

    @on_pretend_device
    def test_moves(tmp_path: Path) -> None:
        assert torch.zeros(2, device="pretend").cpu().tolist() == [0, 0]

A process that has registered the device has an accelerator from then on, also for transformers, accelerate and
`--device auto`. So the decorator runs the test in a forked child; the other tests of the worker see nothing of it.

It cannot show speed, kernels of other hardware and their rounding, streams and events, memory of the device, or C++
that reads a tensor's memory without asking for its address in Python. In-place operators that change a shape are not
supported, nor is `tensor.data = ...`.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_COPIES = ("aten::copy_", "aten::_copy_from", "aten::_to_copy")
_aten = torch.ops.aten


class PretendTensor(Tensor):
    """A tensor on the device: its shape and dtype for torch, its numbers in `on_cpu`. Views of one share memory."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "PretendTensor":
        if on_cpu.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")
        wrapper: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.on_cpu = on_cpu
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        raise RuntimeError(f"data_ptr() of a tensor on {NAME}")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of the numbers, to compare and to measure: views of one tensor have one."""
        return self.on_cpu.untyped_storage()

    def tolist(self) -> Any:
        return self.on_cpu.tolist()  # torch's own refuses subclasses

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{NAME}: {self.on_cpu!r}"


class _Mode(TorchDispatchMode):
    """Sees factories, too, which have no tensor of the device among their arguments yet."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func` on the CPU tensors; what it makes is on the device again, unless it was asked for elsewhere."""
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == NAME
    tensors = [x for value in (*args, *kwargs.values()) for x in _tensors(value)]
    ours = {id(x.on_cpu): x for x in tensors if isinstance(x, PretendTensor)}
    if not ours and not to_device:
        return func(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} of a tensor on {NAME}")
    plain = {id(x) for x in tensors if not isinstance(x, PretendTensor)}
    if ours and plain and func._schema.name not in _COPIES:
        _refuse_mixing(func, args, kwargs)
    options = {name: _on_cpu(value) for name, value in kwargs.items()}
    if to_device:
        options["device"] = torch.device("cpu")
    result = func(*map(_on_cpu, args), **options)
    if func._schema.is_mutable and any(x.on_cpu.shape != x.shape for x in ours.values()):
        raise NotImplementedError(f"{func} resized a tensor on {NAME}")

    def wrapped(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(wrapped, x))
        if not isinstance(x, Tensor) or id(x) in plain or (device is not None and not to_device):
            return x
        return ours[id(x)] if id(x) in ours else PretendTensor(x)  # written in place, or new

    return wrapped(result)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Operators take tensors and lists of tensors, nothing deeper."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (x for x in value if isinstance(x, Tensor))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.on_cpu
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _refuse_mixing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    for argument in func._schema.arguments:
        for x in _tensors(given.get(argument.name)):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not isinstance(x, PretendTensor) and (x.dim() or written):
                raise RuntimeError(f"{func}: {argument.name} {tuple(x.shape)} is on {x.device}, others on {NAME}")


@cache
def _register() -> Library:
    """The device's name in torch, and kernels for what C++ calls where no dispatch mode is asked."""
    _setup_privateuseone_for_python_backend(NAME)
    kernels = Library("aten", "IMPL")

    def empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return PretendTensor(torch.empty(size, dtype=dtype))

    def empty_strided(
        size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _run(_aten.copy_.default, (target, source), {})
        return target

    kernels.impl("empty.memory_format", empty, "PrivateUse1")
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    return kernels


def on_pretend_device(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a child process in which the device is registered. Only its failure comes back, as text."""

    @wraps(test)
    def in_child(*args: Any, **kwargs: Any) -> None:
        read, write = os.pipe()
        child = os.fork()  # warm: nothing is imported again
        if child == 0:
            failure = b""
            try:
                _register()
                # The engine has its threads for the devices that were there at the first backward of the worker.
                with torch.autograd.set_multithreading_enabled(False), _Mode():
                    test(*args, **kwargs)
            except BaseException:
                failure = traceback.format_exc().encode()
            finally:
                sys.stdout.flush()
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(failure)
                os._exit(bool(failure))
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            failure = pipe.read()
        _, status = os.waitpid(child, 0)
        assert not failure, "in the child:\n" + failure.decode()
        assert status == 0, f"the child ended with status {status}"

    return in_child
