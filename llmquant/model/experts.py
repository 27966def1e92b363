"""Experts that transformers holds in one 3-D parameter, taken apart into linears.

transformers computes all experts of a layer from `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]. Nothing there is
an nn.Linear, so nothing could be quantized, and no hook sees what an expert reads. `Experts` takes its place: it has a
list of experts with plain linears and computes them with the original's own gate and activation. `unfuse.py` puts it
there.

No table of architectures: the form is told by the parameters, by the flags that transformers puts on such modules and
by the arguments of their forward.

All experts read their inputs at one point (`Gather`), and their down projections at a second one. There a forward can
be paused, and the experts solved, however many there are.

Shapes: N tokens, k experts of a token, E experts, D hidden, F inner.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

ROUTED, SORTED, SPLIT = "routed", "sorted", "split"  # see `Form`


@dataclass(frozen=True)
class Form:
    """How a fused module is built, by its parameters and its forward.

    calls        routed: (hidden [N, D], expert of each token [N, k], weights [N, k]);
                 sorted: hidden [E N, D], every expert's tokens one after the other;
                 split: (hidden [N, I], tokens of each expert), one projection only
    up, down     names of the parameters; down is "" where there is one projection only
    gated        the first one holds gate and up
    transposed   as [in, out]
    interleaved  gate and up row by row instead of one after the other
    biased       with parameters of the same name and `_bias`
    experts, hidden, inner   E, D and F
    """

    calls: str
    up: str
    down: str
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    experts: int
    hidden: int
    inner: int

    @property
    def leaves(self) -> tuple[tuple[str, int, int], ...]:
        """What an expert's linears are called where the checkpoint does not say: (name, out, in), down last."""
        if self.calls == SPLIT:
            return (("", self.inner, self.hidden),)
        ups = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        return (*((name, self.inner, self.hidden) for name in ups), ("down_proj", self.hidden, self.inner))


def form_of(module: nn.Module) -> Form | None:
    """The form of a fused experts module; None for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):  # whose kernels are no experts
        return None
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    needed = [
        name
        for name, value in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)
    ]
    if set(shapes) == {"weight"} and len(shapes["weight"]) == 3 and len(needed) == 2:
        experts, rows, columns = shapes["weight"]
        return Form(SPLIT, "weight", "", False, False, False, False, experts, columns, rows)
    up, down = next((name for name in ("gate_up_proj", "up_proj") if name in shapes), ""), "down_proj"
    biases = {f"{up}_bias", f"{down}_bias"}
    if not up or set(shapes) - biases != {up, down} or len(shapes[up]) != 3 or len(shapes[down]) != 3:
        return None
    gated = up == "gate_up_proj"
    _, rows, columns = shapes[up]
    experts, *ends = shapes[down]
    transposed = [rows, columns] != [(1 + gated) * ends[1], ends[0]]
    hidden, inner = reversed(ends) if transposed else ends
    if [rows, columns] != ([hidden, (1 + gated) * inner] if transposed else [(1 + gated) * inner, hidden]):
        return None
    calls = {1: SORTED, 3: ROUTED}.get(len(needed))
    if calls is None:
        return None
    interleaved = gated and not getattr(module, "is_concatenated", True)
    return Form(calls, up, down, gated, transposed, interleaved, biases <= set(shapes), experts, hidden, inner)


class _ReadAgain(torch.autograd.Function):
    """A linear whose weights are there only while they are used: autograd, which would keep them, has them read again.

    Arguments: x [N, I], the linear, and what makes the context in which its weights are there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any, present: Callable[[], AbstractContextManager[None]]) -> Tensor:
        ctx.linear, ctx.present, ctx.dtype = linear, present, x.dtype
        with present():
            y: Tensor = linear(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (g,) = gradients
        with ctx.present():
            return (g @ ctx.linear.weight.to(g.dtype)).to(ctx.dtype), None, None


class Gather(nn.Module):
    """The point where all experts of a layer read their inputs; hands them on.

    `down`: they are those of down projections, whose dimensions mean something else in every expert.
    """

    def __init__(self, *, down: bool) -> None:
        super().__init__()
        self.down = down

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs


class Experts(nn.Module):
    """A fused module's stand-in: experts `0`, `1`, ... with linears, and whatever else the module holds.

    `ups` and `down` name the linears of an expert. Attributes and children of the fused module are kept, as its gate,
    its activation and the modules around it read them. `present` (expert, linears) is a context in which the weights of
    these linears are there, where they are not all the time: None.
    """

    present: Callable[[int, Sequence[str]], AbstractContextManager[None]] | None = None

    def __init__(self, fused: nn.Module, form: Form, leaves: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.__dict__ |= {name: value for name, value in vars(fused).items() if not name.startswith("_")}
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.form, self.kind = form, type(fused)
        *ups, down = leaves if form.down else (*leaves, ("", 0, 0))
        self.ups, self.down = [name for name, _, _ in ups], down[0]
        dtype = next(fused.parameters()).dtype
        for index in range(form.experts):
            made = {name: nn.Linear(i, o, form.biased, device="meta", dtype=dtype) for name, o, i in leaves}
            self.add_module(str(index), nn.ModuleDict(made) if form.down else made[""])
        self.up_inputs, self.down_inputs = Gather(down=False), Gather(down=True)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the fused module computes from the same arguments."""
        bound = inspect.signature(self.kind.forward).bind(self, *args, **kwargs).arguments
        _, *given = bound.values()
        forwards: dict[str, Callable[..., Tensor]] = {
            ROUTED: self._routed,
            SORTED: self._sorted,
            SPLIT: self._split,
        }
        return forwards[self.form.calls](*given)

    def _routed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        places = [torch.where(index == expert) for expert in range(self.form.experts)]
        results = self._outputs([hidden[tokens] for tokens, _ in places])
        for (tokens, slots), result in zip(places, results, strict=True):
            out.index_add_(0, tokens, (result * weights[tokens, slots, None]).to(out.dtype))
        for expert in range(self.form.experts, getattr(self, "total_experts", 0)):  # those that hand on what they read
            tokens, slots = torch.where(index == expert)
            out.index_add_(0, tokens, (hidden[tokens] * weights[tokens, slots, None]).to(out.dtype))
        return out

    def _sorted(self, hidden: Tensor) -> Tensor:
        """Tokens that are not an expert's come as zeros, and leave as zeros."""
        given = hidden.view(self.form.experts, -1, hidden.shape[-1])
        out, used = torch.zeros_like(given), [(rows != 0).any(-1) for rows in given]
        results = self._outputs([rows[here] for rows, here in zip(given, used, strict=True)])
        for expert, (here, result) in enumerate(zip(used, results, strict=True)):
            out[expert, here] = result.to(out.dtype)
        return out.view(hidden.shape)

    def _split(self, hidden: Tensor, counts: Any) -> Tensor:
        parts = self.up_inputs(list(torch.split(hidden, [int(count) for count in counts])))
        return torch.cat([self._run(index, "", x) for index, x in enumerate(parts)])

    def _outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """Every expert's output for its tokens; all read first, then all compute."""
        inner = [self._activated(expert, x) for expert, x in enumerate(self.up_inputs(inputs))]
        outputs = [self._run(expert, self.down, x) for expert, x in enumerate(self.down_inputs(inner))]
        norm = getattr(self, "post_expert_norm", None) if getattr(self, "has_post_expert_norm", False) else None
        return outputs if norm is None else [norm(output) for output in outputs]

    def _run(self, expert: int, leaf: str, x: Tensor) -> Tensor:
        """One linear of one expert."""
        linear: Any = self.get_submodule(f"{expert}.{leaf}" if leaf else f"{expert}")
        if (present := self.present) is None:
            result: Tensor = linear(x)
            return result
        if not x.numel():  # an expert that no token of this batch reaches
            return x.new_zeros(*x.shape[:-1], linear.weight.shape[0])
        return cast(Tensor, _ReadAgain.apply(x, linear, lambda: present(expert, [leaf])))  # type: ignore[no-untyped-call]

    def _activated(self, expert: int, x: Tensor) -> Tensor:
        ups = [self._run(expert, name, x) for name in self.ups]
        if not self.form.gated:
            return self._activation(ups[0])
        both = torch.stack(ups, -1).flatten(-2) if self.form.interleaved else torch.cat(ups, -1)
        if (gate := getattr(self.kind, "_apply_gate", None)) is not None:
            gated: Tensor = gate(self, both)
            return gated
        first, second = both.chunk(2, -1)
        return self._activation(first) * second

    def _activation(self, x: Tensor) -> Tensor:
        activated: Tensor = self.get_submodule("act_fn")(x)
        return activated
