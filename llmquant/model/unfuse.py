"""Puts `Experts` in the place of fused modules, and finds their weights in the checkpoint.

Checkpoints hold experts in three ways: a tensor for each (the experts are called what the checkpoint calls them), all
in one tensor (each is read as a slice of it, from the disk as well), or in tensors that a rule of transformers joins.
Before a stand-in is used, a small copy of it with random weights must compute what the fused module does (`_check`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError
from llmquant.model.experts import SORTED, SPLIT, Experts, Form, form_of
from llmquant.model.names import Names, converted
from llmquant.source.base import Source
from llmquant.source.wrapped import Derived

_TOLERANCE = 1e-6  # relative, of the small copy in float64


def unfuse(model: Any, stack: str, source: Source, names: Names) -> dict[str, Derived]:
    """Put `Experts` in the place of every fused module in the blocks, and their linears into `names.renamed`.

    stack   name of the list of blocks in `model`

    Returns the tensors that are slices of fused ones. SourceError where experts are missing, of a form that is not
    known, or compute something else.
    """
    checked: dict[tuple[Any, ...], None] = {}
    derived: dict[str, Derived] = {}
    for owner, fused in list(model.named_modules()):
        if not owner.startswith(f"{stack}.") or (form := form_of(fused)) is None:
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
    if form.calls == SPLIT:
        counts = [1 + expert % 3 for expert in range(form.experts)]
        return random(sum(counts), form.hidden, generator=generator, dtype=torch.float64), counts
    count = 24
    if form.calls == SORTED:
        hidden = random(form.experts, count, form.hidden, generator=generator, dtype=torch.float64)
        hidden[:, ::2] = 0
        return (hidden.view(-1, form.hidden),)
    hidden = random(count, form.hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(count, total, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(min(2, total))
    return hidden, index, weights
