"""Experts that transformers holds in one 3-D parameter, taken apart into linears.

transformers computes all experts of a layer from `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]. Nothing there is
an nn.Linear, so nothing could be quantized, and no hook sees what an expert reads. `unfuse` puts a module in its place
that holds a list of experts with plain linears, computes them with the original's own gate and activation, and calls
them what the checkpoint calls them. Where the checkpoint holds them in one tensor, too, each is read as a slice of it.

No table of architectures: the form is told by the parameters, by the flags that transformers puts on such modules and
by the arguments of their forward. Before it is used, a small copy with random weights must compute the same (`_check`).

All experts read their inputs at one point (`Gather`), and their down projections at a second one. There a forward can
be paused, and the experts solved, however many there are.

Shapes: N tokens, k experts of a token, E experts, D hidden, F inner.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError
from llmquant.model.names import Names, converted
from llmquant.source.base import Source
from llmquant.source.wrapped import Derived

_TOLERANCE = 1e-6  # relative, of the small copy in float64
_ROUTED, _SORTED, _SPLIT = "routed", "sorted", "split"  # see `Form`


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
        if self.calls == _SPLIT:
            return (("", self.inner, self.hidden),)
        ups = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        return (*((name, self.inner, self.hidden) for name in ups), ("down_proj", self.hidden, self.inner))


def form_of(module: nn.Module) -> Form | None:
    """The form of a fused experts module; None for any other module."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    needed = [
        name
        for name, value in inspect.signature(type(module).forward).parameters.items()
        if name != "self" and value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)
    ]
    if set(shapes) == {"weight"} and len(shapes["weight"]) == 3 and len(needed) == 2:
        experts, rows, columns = shapes["weight"]
        return Form(_SPLIT, "weight", "", False, False, False, False, experts, columns, rows)
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
    calls = {1: _SORTED, 3: _ROUTED}.get(len(needed))
    if calls is None:
        return None
    interleaved = gated and not getattr(module, "is_concatenated", True)
    return Form(calls, up, down, gated, transposed, interleaved, biases <= set(shapes), experts, hidden, inner)


class Gather(nn.Module):
    """The point where all experts of a layer read their inputs; hands them on."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return inputs


class Experts(nn.Module):
    """A fused module's stand-in: experts `0`, `1`, ... with linears, and whatever else the module holds.

    `ups` and `down` name the linears of an expert. Attributes and children of the fused module are kept, as its gate,
    its activation and the modules around it read them.
    """

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
        self.up_inputs, self.down_inputs = Gather(), Gather()

    def experts(self) -> list[Any]:
        return [self.get_submodule(str(index)) for index in range(self.form.experts)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the fused module computes from the same arguments."""
        bound = inspect.signature(self.kind.forward).bind(self, *args, **kwargs).arguments
        _, *given = bound.values()
        forwards: dict[str, Callable[..., Tensor]] = {
            _ROUTED: self._routed,
            _SORTED: self._sorted,
            _SPLIT: self._split,
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
        return torch.cat([expert(x) for expert, x in zip(self.experts(), parts, strict=True)])

    def _outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        """Every expert's output for its tokens; all read first, then all compute."""
        experts = self.experts()
        inner = [self._activated(e, x) for e, x in zip(experts, self.up_inputs(inputs), strict=True)]
        outputs = [e[self.down](x) for e, x in zip(experts, self.down_inputs(inner), strict=True)]
        norm = getattr(self, "post_expert_norm", None) if getattr(self, "has_post_expert_norm", False) else None
        return outputs if norm is None else [norm(output) for output in outputs]

    def _activated(self, expert: Any, x: Tensor) -> Tensor:
        ups = [expert[name](x) for name in self.ups]
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


def unfuse(model: Any, source: Source, names: Names) -> dict[str, Derived]:
    """Put `Experts` in the place of every fused module of `model`, and their linears into `names.renamed`.

    Returns the tensors that are slices of fused ones. SourceError where experts are missing, of a form that is not
    known, or compute something else.
    """
    checked: dict[tuple[Any, ...], None] = {}
    derived: dict[str, Derived] = {}
    for owner, fused in list(model.named_modules()):
        if (form := form_of(fused)) is None:
            continue
        leaves, tensors = _on_disk(model, owner, form, source, names)
        kind = (type(fused), form, tuple(leaves))
        if kind not in checked:
            _check(f"{source.name}: {owner}", fused, form, leaves)
            checked[kind] = None
        parent, _, name = owner.rpartition(".")
        model.get_submodule(parent)._modules[name] = Experts(fused, form, leaves)
        for key, tensor in tensors.items():
            names.renamed[key] = key
            derived[key] = tensor
    return derived


def _on_disk(
    model: Any, owner: str, form: Form, source: Source, names: Names
) -> tuple[list[tuple[str, int, int]], dict[str, Derived]]:
    """The linears of an expert as the checkpoint calls them, and those that are slices of its tensors."""
    up, down = (f"{owner}.{name}" if name else "" for name in (form.up, form.down))
    group = names.converted.get(up)
    if group is not None and group.operations[0] == "MergeModulelist":  # one tensor for each expert
        ups = names.converted.pop(up).by_pattern()
        downs = names.converted.pop(down).by_pattern() if down in names.converted else []
        return _renamed(owner, form, source, names, [*ups, *downs]), {}
    stored = {name: key for key, name in names.renamed.items()}
    if group is None and up not in stored:  # one for each, under these names; what is missing is found later
        return list(form.leaves), {}
    tensors: dict[str, Derived] = {}
    for parameter in [name for name in (form.up, form.down) if name]:
        for name in [parameter, f"{parameter}_bias"][: 1 + form.biased]:
            fused = _fused(model, f"{owner}.{name}", stored, names)
            tensors |= _slices(owner, fused, parameter, form, source, bias=name != parameter)
    return list(form.leaves), tensors


@dataclass(frozen=True)
class _Fused:
    """A parameter of all experts: the tensors that it is made of, and one expert's entry of it."""

    keys: tuple[str, ...]
    entry: Callable[[Source, int], Tensor]


def _fused(model: Any, name: str, stored: Mapping[str, str], names: Names) -> _Fused:
    """The parameter `name`, which lies in one tensor, or in several that a rule joins expert by expert."""
    if (group := names.converted.pop(name, None)) is None:
        key = stored[name]
        del names.renamed[key]
        return _Fused((key,), lambda source, expert: source.read_entry(key, expert))

    wanted = model.get_parameter(name)
    one = torch.empty(1, *wanted.shape[1:], device="meta")  # the rule may ask for the shape that it is to make
    view = SimpleNamespace(get_parameter=lambda _: one, config=model.config)

    def entry(source: Source, expert: int) -> Tensor:
        return converted(view, name, group, lambda key: source.read_entry(key, expert)[None], source)[name][0]

    return _Fused(tuple(key for _, key in group.keys), entry)


def _renamed(
    owner: str, form: Form, source: Source, names: Names, tensors: list[list[str]]
) -> list[tuple[str, int, int]]:
    """Names of an expert's linears where each has a tensor of its own: `tensors` of all experts, up ones first."""
    sizes = [(rows, columns) for _, rows, columns in form.leaves]
    if len(tensors) == len(sizes) - 1 and form.gated:  # gate and up of an expert in one
        sizes = [(2 * form.inner, form.hidden), sizes[-1]]
    leaves = []
    for keys, size in zip(tensors, sizes, strict=False):
        numbers = [_number(key) for key in keys]
        if numbers != list(range(form.experts)) or len(tensors) != len(sizes):
            raise SourceError(
                f"{source.name}: {owner}",
                f"{len(keys)} experts in {len(tensors)} kinds of tensors on disk",
                expected=f"{form.experts} in {len(sizes)}, by config.json",
                remedy="config.json and the weights do not belong together, or the download is incomplete",
            )
        leaf = keys[0].split(".")[-2]
        leaves.append((leaf, *size))
        for number, key in enumerate(keys):
            names.renamed[key] = f"{owner}.{number}.{leaf}.weight"
    return leaves


def _number(key: str) -> int | None:
    """The number of the expert in a tensor's name: the last one of its path."""
    numbers = [int(part) for part in key.split(".") if part.isdigit()]
    return numbers[-1] if numbers else None


def _slices(owner: str, fused: _Fused, parameter: str, form: Form, source: Source, *, bias: bool) -> dict[str, Derived]:
    """Each expert's part of a fused parameter: weights [out, in], biases [out]."""
    found: dict[str, Derived] = {}
    leaves = [leaf for leaf in form.leaves if (leaf[0] == "down_proj") == (parameter == form.down and bool(form.down))]
    for info in (source.tensors[key] for key in fused.keys):
        if not info.shape or info.shape[0] != form.experts:
            got = f"shape {list(info.shape)}"
            raise SourceError(f"{source.name}: {info.name}", got, expected=f"{form.experts} experts, by config.json")
    dtype, of = source.tensors[fused.keys[0]].dtype, " and ".join(fused.keys)
    for expert in range(form.experts):
        for position, (leaf, rows, columns) in enumerate(leaves):

            def read(stored: Source, expert: int = expert, position: int = position) -> Tensor:
                entry = fused.entry(stored, expert)
                return _part(entry if bias or not form.transposed else entry.T, form, position, len(leaves))

            name = ".".join(part for part in (owner, str(expert), leaf, "bias" if bias else "weight") if part)
            shape = (rows,) if bias else (rows, columns)
            found[name] = Derived(dtype, shape, fused.keys, f"expert {expert} of {of}", read)
    return found


def _part(entry: Tensor, form: Form, position: int, count: int) -> Tensor:
    """Gate or up (`position` of `count`) from the rows of both; all of them where there is one."""
    if count == 1:
        return entry.contiguous()
    rows = entry[position::2] if form.interleaved else entry.chunk(2)[position]
    return rows.contiguous()


def _check(where: str, fused: nn.Module, form: Form, leaves: Sequence[tuple[str, int, int]]) -> None:
    """SourceError unless `Experts` computes what the fused module does, on a small copy with random numbers."""
    generator = torch.Generator().manual_seed(0)
    # 1. A copy in float64 whose sizes are small: the same small one for the same large one.
    inner = 8
    sizes = {form.hidden: 16, 2 * form.inner: 2 * inner, form.inner: inner}
    small = copy.deepcopy(fused)
    for module in small.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = [*parameter.shape[:1], *(sizes.get(n, n) for n in parameter.shape[1:])]
            if parameter.ndim < 2:
                shape = [sizes.get(n, n) for n in parameter.shape]
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, value in vars(module).items():
            if type(value) is int and value in sizes and "expert" not in name.replace("expert_dim", ""):
                module.__dict__[name] = sizes[value]
    if (config := getattr(small, "config", None)) is not None:
        config._experts_implementation = "eager"
    # 2. The same weights as linears.
    small_form = form_of(small)
    assert small_form is not None
    ours = Experts(small, small_form, [(name, sizes[rows], sizes[columns]) for name, rows, columns in leaves])
    for target, value in _taken_apart(small, small_form, [name for name, _, _ in leaves]):
        module = ours.get_submodule(target.rpartition(".")[0])
        module._parameters[target.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)
    # 3. Both on the same tokens.
    given = _tokens(small_form, getattr(fused, "total_experts", form.experts), generator)
    with torch.no_grad():
        try:
            wanted, got = small(*given), ours(*given)
        except Exception as error:  # whatever a module of another form raises
            raise _unknown(where, fused, f"{type(error).__name__}: {error}"[:120]) from error
    worst = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not worst <= _TOLERANCE:
        raise _unknown(where, fused, f"expert by expert it computes something else, by {worst:.1e}")


def _unknown(where: str, fused: nn.Module, why: str) -> SourceError:
    return SourceError(
        where,
        f"experts of an unknown form ({type(fused).__name__}: {why})",
        expected="projections of every expert with a gate and an activation between them",
    )


def _taken_apart(small: nn.Module, form: Form, leaves: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a fused module as those of `Experts`: (name, value)."""
    ups = leaves[:-1] if form.down else leaves
    for parameter, names in ((form.up, ups), (form.down, leaves[-1:])):
        for bias in (False, True) if form.biased and parameter else (False,):
            values: Mapping[str, Any] = dict(small.named_parameters(recurse=False))
            stacked = values[f"{parameter}_bias" if bias else parameter] if parameter else []
            for expert, entry in enumerate(stacked[: form.experts]):
                rows = entry if bias or not form.transposed else entry.T
                for position, leaf in enumerate(names):
                    path = ".".join(part for part in (str(expert), leaf, "bias" if bias else "weight") if part)
                    yield path, _part(rows, form, position, len(names))


def _tokens(form: Form, total: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Random arguments of the module's forward: two experts for each of some tokens."""
    random: Callable[..., Tensor] = torch.randn
    if form.calls == _SPLIT:
        counts = [1 + expert % 3 for expert in range(form.experts)]
        return random(sum(counts), form.hidden, generator=generator, dtype=torch.float64), counts
    count = 24
    if form.calls == _SORTED:
        hidden = random(form.experts, count, form.hidden, generator=generator, dtype=torch.float64)
        hidden[:, ::2] = 0
        return (hidden.view(-1, form.hidden),)
    hidden = random(count, form.hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(count, total, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(min(2, total))
    return hidden, index, weights
