"""How each linear of the decoder blocks is treated: quantized by a scheme and a solver, or kept, and why.

The first that matches decides: what the user ignores, what cannot or need not be quantized, the recipe's rules, its own
fields. Then sets that servers run as one (q, k and v; all experts of a layer) are made alike.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmquant.errors import RecipeError, SourceError, option
from llmquant.formats.base import in_block
from llmquant.formats.facts import FACTS, fused_sets, is_split_by_inputs
from llmquant.model.meta import is_linear, shape_OI
from llmquant.model.skeleton import Skeleton
from llmquant.outside import outside_schemes
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers import DATA_FREE
from llmquant.recipe import Recipe
from llmquant.rules import Ignored, Rule, why_small
from llmquant.source.names import kinds

NO_LINEAR = re.compile(r"embed|norm|wte|wpe", re.IGNORECASE)  # in the names of weights that no class of ours knows
UNFIT = "(--unfit keep)"  # ends the reason of what is kept because it fits no group or format
_SMALL = 50  # a linear with less than this part of its block's weights is not worth a refusal
_GROUP_SIZES = (128, 64, 32)  # that `auto` chooses from
_SPLIT = 8_000_000_000  # weights in the blocks, from which on servers may split a model over several devices


@dataclass(frozen=True)
class Treatment:
    """How one linear is quantized; `scheme` None: it is kept. `why` is for the ledger, `by_rule`: a rule had a say."""

    scheme: QuantScheme | None
    method: str
    why: str
    by_rule: bool = False

    @property
    def care(self) -> tuple[float, ...]:
        """How much of the weight it keeps: dense, then bits, smaller groups, zero points."""
        if self.scheme is None:
            return (math.inf,)
        group = math.inf if self.scheme.group_size == -1 else self.scheme.group_size
        return (self.scheme.bits, -group, not self.scheme.symmetric)


def with_group_size(recipe: Recipe, skeleton: Skeleton) -> tuple[Recipe, str]:
    """`recipe` with a number in place of the group size "auto", and what was chosen, in words; else as it is, and "".

    The largest of 128, 64 and 32 that the formats hold and that divides the inputs of all linears; where there is none,
    of most of their weights. In a large model it divides half of those inputs that tensor parallelism splits, too, or
    two devices could not share it. Linears whose size a rule sets, and small ones, do not count. One size for all, as
    some formats and runtimes know only one.
    """
    if recipe.group_size != "auto":
        return recipe, ""
    by_row = treatments(list(skeleton.source.tensors), skeleton, replace(recipe, group_size=-1, unfit="fail"))
    split = sum(block.n_weights for block in skeleton.blocks) >= _SPLIT
    weights = Counter[int]()  # by what a group must divide
    for module, treatment in by_row.items():
        rule = next((rule for rule in recipe.rules if rule.matches(module)), None)
        decided = treatment.scheme is not None and (rule is None or rule.group_size is None)
        decided = decided and module in skeleton.modules and skeleton.block_of(module) is not None
        if decided and not _is_small(skeleton, module):
            rows, columns = shape_OI(skeleton.modules[module])
            weights[columns // 2 if split and is_split_by_inputs(module) else columns] += rows * columns
    held = [size for size in _GROUP_SIZES if all(size in FACTS[name].groups for name in recipe.formats)]
    best = min(held, key=lambda size: sum(count for columns, count in weights.items() if columns % size))
    divided = "the inputs" + ", also those of two devices that share it" * split
    chosen = f"{best}, the largest of {', '.join(map(str, held))} that divides {divided}"
    return replace(recipe, group_size=best), chosen


def treatments(keys: Sequence[str], skeleton: Skeleton, recipe: Recipe, *, auto: bool = False) -> dict[str, Treatment]:
    """The treatment of every linear of the decoder blocks whose weight is among `keys`, by the name of its module.

    With `auto`, `with_group_size` chose the recipe's group size, which each of its linears then says.

    The first that matches decides: an --ignore pattern, a rule, the recipe's own fields. What is too small to be worth
    its error (`rules.SMALL`) stays dense, unless a rule matches nothing but such linears, and so means them.
    RecipeError where a pattern or a rule decides nothing.
    """
    chosen: dict[str, Treatment] = {}
    linears = [module_of(skeleton, key) for key in keys if _is_candidate(skeleton, key)]
    small = {module: why for module in linears if (why := _why_small(skeleton, module))}
    meant = [rule for rule in recipe.rules if not any(rule.matches(m) for m in linears if m not in small)]
    patterns = {pattern: Ignored(pattern) for pattern in recipe.ignore}
    unused_patterns, unused_rules = dict(patterns), dict.fromkeys(recipe.rules)
    for key in keys:
        module = module_of(skeleton, key)
        ignored = [name for name, pattern in patterns.items() if pattern.matches(key, module)]
        for pattern in ignored:
            unused_patterns.pop(pattern, None)
        rule = next((rule for rule in recipe.rules if rule.matches(module)), None)
        if rule is not None and not ignored and is_foreign(skeleton, key, skeleton.source.tensors[key].shape):
            chosen[module] = _foreign(recipe, rule, key, auto=auto)
            unused_rules.pop(rule, None)
        if not _is_candidate(skeleton, key):
            continue
        if ignored:
            chosen[module] = Treatment(None, "", f"--ignore {ignored[0]}")
        elif why := skeleton.unquantizable(module):
            chosen[module] = Treatment(None, "", why)
        elif module in small and rule not in meant and not (rule is not None and rule.keep):
            chosen[module] = Treatment(None, "", small[module])
        else:
            chosen[module] = _fitted(_treatment(recipe, rule, auto=auto), module, skeleton, recipe)
            if rule is not None:
                unused_rules.pop(rule, None)
    for module, (scheme, why) in outside_schemes(skeleton, recipe).items():
        chosen[module] = Treatment(scheme, "" if scheme is None else "nearest", why)
    for idle in unused_patterns.values():
        _refuse_idle(idle, skeleton)
    for rule in unused_rules:
        _refuse_unused(rule, skeleton, chosen)
    return _widened(chosen, skeleton)


def _is_candidate(skeleton: Skeleton, key: str) -> bool:
    """Whether the tensor is the weight of a linear in a decoder block."""
    param = skeleton.param_of.get(key)
    if param is None or skeleton.block_of(param) is None or not param.endswith(".weight"):
        return False
    return is_linear(skeleton.modules[param.removesuffix(".weight")])


def is_foreign(skeleton: Skeleton, key: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is a matrix that the model's class does not know, such as one of an MTP head.

    Nothing runs it here: it is quantized, without text, only if a rule says so.
    """
    return key.endswith(".weight") and len(shape) == 2 and key not in skeleton.param_of and not NO_LINEAR.search(key)


def _foreign(recipe: Recipe, rule: Rule, key: str, *, auto: bool) -> Treatment:
    treatment = _treatment(recipe, rule, auto=auto)
    if treatment.scheme is not None and treatment.method not in DATA_FREE:
        raise RecipeError(
            f"rule '{rule}'",
            f"matches {key}, which the model's class does not run",
            expected="a method that needs no text",
            remedy="add method=rtn to the rule",
            field="rules",
        )
    return replace(treatment, why=treatment.why.replace("of a decoder block", "that the model's class does not know"))


def _why_small(skeleton: Skeleton, module: str) -> str:
    """Why a linear is too small to be quantized, for the ledger; "" where it is not."""
    _, path = in_block(module) or ("", module)
    return why_small(path, *shape_OI(skeleton.modules[module]))


def _treatment(recipe: Recipe, rule: Rule | None, *, auto: bool) -> Treatment:
    if rule is not None and rule.keep:
        return Treatment(None, "", f"rule '{rule}'", True)
    settings = {} if rule is None else rule.settings
    bits, group_size, symmetric, method = (
        settings.get(name, getattr(recipe, name)) for name in ("bits", "group_size", "symmetric", "method")
    )
    why = "linear layer of a decoder block" + ("" if rule is None else f", rule '{rule}'")
    if auto and "group_size" not in settings:
        why += ", groups by --group-size auto"
    return Treatment(QuantScheme(bits, group_size, symmetric), method, why, rule is not None)


def _fitted(treatment: Treatment, module: str, skeleton: Skeleton, recipe: Recipe) -> Treatment:
    """`treatment`, or keep a linear that its groups do not divide or a format cannot hold: by the recipe's `unfit`, or
    because it is small. Others are refused later."""
    if (scheme := treatment.scheme) is None:
        return treatment
    rows, columns = shape_OI(skeleton.modules[module])
    uneven = "" if scheme.divides(columns) else f"groups of {scheme.group_size} do not divide its {columns} inputs"
    odd = (f"{why} in {name}" for name in recipe.formats if (why := FACTS[name].why_unfit(rows, columns)))
    if recipe.unfit == "keep" and (why := uneven or next(odd, "")):
        return Treatment(None, "", f"{why} {UNFIT}", by_rule=True)  # and so do those that servers join with it
    if uneven and _is_small(skeleton, module):
        return Treatment(None, "", f"small, and {uneven}", treatment.by_rule)
    return treatment


def _is_small(skeleton: Skeleton, module: str) -> bool:
    """Whether a linear is so small a part of its block that it may stay dense without a question."""
    index = skeleton.block_of(module)
    assert index is not None
    return bool(_SMALL * skeleton.modules[module].weight.numel() <= skeleton.blocks[index].n_weights)


def _refuse_idle(ignored: Ignored, skeleton: Skeleton) -> None:
    """RecipeError for a pattern that names nothing. What it names may be without weights of its own, as a tied head."""
    names = [name for name in skeleton.modules if name]
    if any(ignored.matches(f"{name}.weight", name) for name in names):
        return
    text, said = ignored.pattern.removeprefix("re:").strip(".*^$"), f"{ignored.pattern!r} matches no tensor"
    of_class = [name for name in names if type(skeleton.modules[name]).__name__ == text]
    if of_class:
        raise RecipeError(
            option("ignore"), f"{said}: it is the class of {kinds(of_class)}", remedy="name modules, not classes"
        )
    leaves = {name.rpartition(".")[2] for name in names} - {""}
    near = difflib.get_close_matches(text, sorted(leaf for leaf in leaves if not leaf.isdecimal()), n=3, cutoff=0.4)
    raise RecipeError(
        option("ignore"),
        said,
        expected="a regular expression that does, or a pattern such as *.down_proj",
        remedy=f"there are {', '.join(near)}" if near else "`llmquant plan` lists all names",
    )


def _refuse_unused(rule: Rule, skeleton: Skeleton, linears: Iterable[str]) -> None:
    """RecipeError that says why no linear is decided by `rule`."""
    where = f"rule '{rule}'"
    if any(rule.matches(module) for module in linears):
        raise RecipeError(
            where,
            "decides nothing: what stands before it matches all its linears",
            remedy="put it before, or out",
            field="rules",
        )
    found = [(name, type(m).__name__) for name, m in skeleton.model.named_modules() if name and rule.matches(name)]
    if found:
        name, kind = found[-1]
        raise RecipeError(
            where, f"matches {name} ({kind})", expected="a linear layer of a decoder block", field="rules"
        )
    raise RecipeError(where, "matches no module", expected="the name of a linear layer, or a part of it", field="rules")


def _expert_sets(chosen: Mapping[str, Treatment], skeleton: Skeleton) -> list[list[str]]:
    """The linears of all experts of each layer: servers run them in one kernel, of one scheme.

    RecipeError where --ignore keeps some of a layer's experts and not all.
    """
    sets: dict[str, list[str]] = {}
    for module in chosen:
        if (owner := skeleton.experts_of(module)) is not None:
            sets.setdefault(owner, []).append(module)
    for owner, members in sets.items():
        kept = [member for member in members if chosen[member].scheme is None and not chosen[member].by_rule]
        if kept and len(kept) < len(members):
            raise RecipeError(
                owner,
                f"{len(kept)} of the {len(members)} linears of its experts are kept ({chosen[kept[0]].why})",
                expected="all experts of a layer, or none: servers run them in one kernel",
                remedy=f"{option('ignore')} {re.escape(owner.rpartition('.')[2])}, or a pattern that spares them",
                field="ignore",
            )
    return list(sets.values())


def _widened(chosen: dict[str, Treatment], skeleton: Skeleton) -> dict[str, Treatment]:
    """Sets that servers run as one matrix (q, k, v; gate, up) get the scheme of their most careful member, and so do
    all experts of a layer.

    Only where a rule decided a member: --ignore alone keeps what it names and nothing else. It holds for all formats,
    as one checkpoint may be exported to any other.
    """
    wider = dict(chosen)
    for members in (*fused_sets(chosen), *_expert_sets(chosen, skeleton)):
        best = max(members, key=lambda member: chosen[member].care)  # the first of equals
        if not any(chosen[member].by_rule for member in members):
            continue
        for member in members:
            if chosen[member].scheme != (scheme := chosen[best].scheme):
                leaf, together = best.rpartition(".")[2], "servers run them as one matrix"
                what = "linear layer of a decoder block, with the scheme" if scheme else f"{chosen[best].why}, the fate"
                why = f"{what} of {leaf}: {together}"
                wider[member] = Treatment(scheme, "" if scheme is None else chosen[member].method, why, True)
    return wider


def module_of(skeleton: Skeleton, key: str) -> str:
    return skeleton.param_of.get(key, key).rpartition(".")[0]


def refuse_unknown_experts(keys: Iterable[str], skeleton: Skeleton, recipe: Recipe) -> None:
    """SourceError for experts that are no linears, unless the user keeps them: they would be most of the model."""
    for key in keys:
        param = skeleton.param_of.get(key)
        if param is None or skeleton.block_of(param) is None or len(skeleton.source.tensors[key].shape) < 2:
            continue
        module = skeleton.modules[param.rpartition(".")[0]]
        known = is_linear(module) or "expert" not in type(module).__name__.lower()
        if not known and not any(Ignored(p).matches(key, param.rpartition(".")[0]) for p in recipe.ignore):
            raise SourceError(
                f"{skeleton.where}: {key}",
                f"experts of an unknown form ({type(module).__name__})",
                expected="projections of every expert with a gate and an activation between them",
                remedy=f"keep them in 16 bit with {option('ignore')}",
            )
