"""A rule per tensor: how rules are written, what they decide in the plan, and what is refused before the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, LLAMA, SMALL, build

import llmquant
from llmquant.draft import draft
from llmquant.errors import FormatError, RecipeError
from llmquant.log import SILENT, progress_of
from llmquant.model.skeleton import Skeleton
from llmquant.plan import Plan, make_plan
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe
from llmquant.rules import SETTINGS, Rule, make_rules, parse_rule, why_small
from llmquant.source.resolve import open_source
from llmquant.treatments import with_group_size

ModelOf = Callable[[str], Path]


MIXED = ["down_proj: bits=8", "layers.1.*v_proj: bits=8, method=rtn", "glob:*.layers.2.self_attn.*: group_size=64"]


def quantized(model: Path, out: Path, rules: Any = MIXED, **flags: Any) -> Path:
    llmquant.quantize(model, make_recipe("x", flags=SMALL | {"rules": rules} | flags), out)
    return out


# -- how a rule is written -----------------------------------------------------------------------------
def test_three_ways_to_write_a_rule_mean_the_same(tmp_path: Path) -> None:
    text = "glob:*.mlp.down_proj: bits=8, group_size=-1, symmetric=false, method=rtn"
    table = {"match": "glob:*.mlp.down_proj", "bits": 8, "group_size": -1, "symmetric": False, "method": "rtn"}
    assert make_rules([text]) == make_rules([table]) == (Rule(**table),)  # type: ignore[arg-type]
    file = tmp_path / "mixed.toml"
    file.write_text('bits = 4\n[[rules]]\nmatch = "down_proj"\nbits = 8\n[[rules]]\nmatch = "layers.0."\nkeep = true\n')
    recipe = make_recipe("x", file)
    assert recipe.rules == (Rule("down_proj", bits=8), Rule("layers.0.", keep=True))
    assert recipe == make_recipe("x", flags={"rules": ["down_proj: bits=8", "layers.0.: keep"]})
    assert recipe == llmquant.Recipe(rules=("down_proj: bits=8", Rule("layers.0.", keep=True)))  # type: ignore[arg-type]


settings = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in SETTINGS.items()})


@given(st.sampled_from(["down_proj", "(?:q|k)_proj", "glob:*.[0-3].*", r"a=b, c\.d"]), settings)
def test_a_rule_reads_back_from_its_text(match: str, settings: dict[str, Any]) -> None:
    rule = Rule(match, keep=not settings, **settings)
    assert parse_rule(str(rule)) == rule


WRONG = [
    ("down_proj", "rule 'down_proj': no settings"),
    ("down_proj: bits=5", "rule 'down_proj': bits: '5'; expected one of 2, 3, 4, 8"),
    ("down_proj: bits=16", "rule 'down_proj': bits: '16'"),
    ("down_proj: bit=8", "'bit=8'; expected keep, or some of bits=..."),
    ("down_proj: bits=8, bits=4", "bits is there twice"),
    ("down_proj: keep, bits=4", "keeps, and sets bits"),
    ("down_proj: keep=true", "'keep=true'"),
    ("down_proj: symmetric=yes", "symmetric: 'yes'; expected one of true, false"),
    ("down_proj: method=awq", "method: 'awq'; expected one of gptq, rtn"),
    ("down_proj: group_size=96", "group_size: '96'; expected one of 32, 64, 128, -1"),
    ("down_proj: ", "''; expected keep"),
    ("(: keep", "missing ), unterminated subpattern"),
    (": keep", "has no pattern"),
    ("glob:: keep", "has no pattern"),
    ({"match": "a", "bit": 8}, "rule 'a': bit: unknown key; did you mean bits?"),
    ({"bits": 8}, "has no pattern"),
    ({"match": "a"}, "rule 'a': says nothing"),
    ({"match": "a", "bits": True}, "rule 'a': bits: True"),
    ({"match": "a", "bits": 8.0}, "rule 'a': bits: 8.0"),
    ({"match": "a", "keep": 1}, "rule 'a': keep: 1"),
    ({"match": 7, "keep": True}, "has no pattern"),
    (7, "recipe: rules: 7"),
]


@pytest.mark.parametrize(("value", "message"), WRONG)
def test_what_is_no_rule_is_refused_in_one_line_that_names_it(value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe("x", flags={"rules": [value]})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_rules_of_one_pattern_are_refused() -> None:
    with pytest.raises(RecipeError, match="rule 'down_proj': is there twice"):
        make_recipe("x", flags={"rules": ["down_proj: bits=8", "down_proj: group_size=64"]})
    with pytest.raises(RecipeError, match="recipe: rules: 'down_proj: keep'; expected list"):
        make_recipe("x", flags={"rules": "down_proj: keep"})


def test_names_and_plain_data() -> None:
    by_128 = {"group_size": 128}
    assert make_recipe("x", flags=by_128).scheme_name == "W4A16-G128"
    assert make_recipe("x", flags=by_128 | {"rules": ["a: bits=8"]}).scheme_name == "W4A16-G128-mixed"
    for rule in ("a: keep", "a: method=rtn", "a: bits=4"):
        assert make_recipe("x", flags=by_128 | {"rules": [rule]}).scheme_name == "W4A16-G128"
    assert "rules" not in make_recipe("x").as_dict()
    recipe = make_recipe("x", flags={"rules": MIXED})
    assert make_recipe("x", flags=recipe.as_dict()) == recipe


# -- the plan ------------------------------------------------------------------------------------------
def plan_of(model: Path, **flags: Any) -> Plan:
    source = open_source(model)
    skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
    recipe, chosen = with_group_size(make_recipe("x", flags={"group_size": 32} | flags), skeleton)
    return make_plan(source, skeleton, recipe, auto=bool(chosen))


def schemes(plan: Plan) -> dict[str, tuple[int, int]]:
    """(bits, group size) of the quantized linears of block 0, by the last part of their names."""
    found = [spec for spec in plan.specs if ".layers.0." in spec.module]
    return {spec.module.rpartition(".")[2]: (spec.scheme.bits, spec.scheme.group_size) for spec in found}


def reason(plan: Plan, name: str) -> str:
    return next(row.reason for row in plan.rows if row.name == name)


def test_the_first_rule_that_matches_decides_and_the_rest_falls_to_the_recipe(tiny_model: ModelOf) -> None:
    plan = plan_of(
        tiny_model("llama"), bits=3, rules=["layers.0.mlp.down: bits=8", "down_proj: bits=4", "o_proj: keep"]
    )
    assert schemes(plan)["down_proj"] == (8, 32)
    assert schemes(plan)["q_proj"] == (3, 32)
    assert "o_proj" not in schemes(plan)
    assert {spec.scheme.bits for spec in plan.specs if "layers.1.mlp.down" in spec.module} == {4}
    assert reason(plan, "model.layers.0.self_attn.o_proj.weight") == "rule 'o_proj: keep'"
    assert "rule 'down_proj: bits=4'" in reason(plan, "model.layers.1.mlp.down_proj.weight")
    assert reason(plan, "model.layers.0.self_attn.q_proj.weight") == "linear layer of a decoder block"


def test_a_rule_that_says_what_the_recipe_says_changes_no_scheme(tiny_model: ModelOf) -> None:
    model = tiny_model("llama")
    assert plan_of(model, rules=["proj: bits=4"]).specs == plan_of(model).specs
    kept, ignored = plan_of(model, rules=["down_proj: keep"]), plan_of(model, ignore=["down_proj"])
    assert (kept.specs, kept.dense_linears) == (ignored.specs, ignored.dense_linears)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["v_proj: bits=8"], {"q_proj": (8, 32), "k_proj": (8, 32), "v_proj": (8, 32), "o_proj": (4, 32)}),
        (["v_proj: group_size=64"], {"q_proj": (4, 32), "k_proj": (4, 32), "v_proj": (4, 32)}),
        (["up_proj: bits=3", "gate_proj: bits=2"], {"up_proj": (3, 32), "gate_proj": (3, 32)}),
        (["k_proj: keep", "v_proj: bits=8"], {"q_proj": None, "k_proj": None, "v_proj": None}),
        (["self_attn: bits=8"], {"q_proj": (8, 32), "o_proj": (8, 32), "up_proj": (4, 32)}),
    ],
)
def test_what_servers_fuse_gets_the_most_careful_scheme(
    rules: list[str], expected: dict[str, Any], tiny_model: ModelOf
) -> None:
    plan = plan_of(tiny_model("llama"), rules=rules)
    found = schemes(plan)
    assert {name: found.get(name) for name in expected} == expected
    assert plan_of(tiny_model("llama"), format="fake", rules=rules).specs == plan.specs


def test_the_ledger_names_whom_a_widened_linear_follows(tiny_model: ModelOf) -> None:
    plan = plan_of(tiny_model("llama"), rules=["v_proj: bits=8", "gate_proj: keep"])
    assert reason(plan, "model.layers.0.self_attn.q_proj.weight") == (
        "linear layer of a decoder block, with the scheme of v_proj: servers run them as one matrix"
    )
    assert reason(plan, "model.layers.0.mlp.up_proj.weight") == (
        "rule 'gate_proj: keep', the fate of gate_proj: servers run them as one matrix"
    )


def test_ignore_alone_widens_nothing_and_stands_before_all_rules(tiny_model: ModelOf) -> None:
    found = schemes(plan_of(tiny_model("llama"), ignore=["k_proj", "down_proj"], rules=["mlp: bits=8"]))
    assert "k_proj" not in found
    assert found["q_proj"] == (4, 32)
    assert "down_proj" not in found
    assert found["up_proj"] == (8, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rules": ["nosuch: keep"]}, "rule 'nosuch: keep': matches no module"),
        (
            {"rules": ["embed_tokens: bits=8"]},
            r"matches model\.embed_tokens \(Embedding\); expected a linear layer of a",
        ),
        ({"rules": ["lm_head: keep"]}, r"matches lm_head \(Linear\)"),
        ({"rules": ["glob:down_proj: keep"]}, "matches no module"),
        ({"rules": ["mlp: bits=8", "down_proj: bits=3"]}, "rule 'down_proj: bits=3': decides nothing"),
        ({"rules": ["down_proj: bits=8"], "ignore": ["down_proj"]}, "decides nothing"),
        (
            {"rules": [".: keep"]},
            r"no linear is left to quantize \(21 of 21: rule .*; check --ignore and the rules that keep",
        ),
        ({"rules": ["down_proj: group_size=64"]}, r"down_proj \(96\).*not divisible by group size 64"),
    ],
)
def test_rules_that_decide_nothing_are_refused_before_the_work(
    flags: dict[str, Any], message: str, tiny_model: ModelOf, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        quantized(tiny_model("llama"), tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())
    found = estimate(tiny_model("llama"), make_recipe("x", flags=SMALL | flags), RunOptions(tmp_path / "out"))
    assert str(error.value) in [problem.message for problem in found.problems if problem.blocking]


def test_a_format_without_mixed_schemes_is_refused_by_name_before_the_work(tiny_model: ModelOf, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="awq knows one scheme for all layers"):
        quantized(tiny_model("llama"), tmp_path / "a", ["down_proj: group_size=-1"], format="awq")
    with pytest.raises(FormatError, match=r"down_proj: 8 bits in awq"):
        quantized(tiny_model("llama"), tmp_path / "a", format="compressed-tensors,awq")
    with pytest.raises(FormatError, match=r"--for transformers: .*have different schemes"):
        llmquant.quantize(
            tiny_model("llama"),
            make_recipe("x", flags=SMALL | {"rules": MIXED, "format": "gptq"}),
            tmp_path / "a",
            runtimes=["transformers"],
        )
    # transformers unpacks a subclass of nn.Linear at loading, all of them by the first group.
    with pytest.raises(FormatError, match="FalconLinear layers of several schemes"):
        quantized(tiny_model("falcon"), tmp_path / "a", ["dense_4h_to_h: bits=8"])
    assert not list(tmp_path.iterdir())


# -- what stays dense by itself -----------------------------------------------------------------------
DOGE = LLAMA | {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose router is a plain linear: 8 outputs of 64 inputs. One output for a head has its `dt_proj`."""
    return build(tmp_path_factory.mktemp("routed") / "doge", ("DogeConfig", DOGE))


def test_routers_and_narrow_linears_stay_dense(routed: Path) -> None:
    plan = plan_of(routed)
    assert reason(plan, "model.layers.0.mlp.router_gate.weight") == "router or gate: 8 outputs of 64 inputs"
    assert reason(plan, "model.layers.1.self_attn.dt_proj.weight") == "narrow linear: 2 outputs of 32 inputs"
    assert set(schemes(plan)) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {"model.layers.0.mlp.router_gate", "model.layers.1.self_attn.dt_proj"} <= set(plan.ignore)


def test_a_rule_that_means_a_router_decides_it(routed: Path) -> None:
    assert schemes(plan_of(routed, rules=["router_gate: bits=8"]))["router_gate"] == (8, 32)
    assert "router_gate" not in schemes(plan_of(routed, rules=["mlp: bits=8"]))
    assert "dt_proj" not in schemes(plan_of(routed, rules=["router_gate: bits=8", "layers: bits=8"]))
    kept = plan_of(routed, rules=["layers.0.mlp: keep"])
    assert reason(kept, "model.layers.0.mlp.router_gate.weight") == "rule 'layers.0.mlp: keep'"
    ignored = plan_of(routed, ignore=["router"])
    assert reason(ignored, "model.layers.0.mlp.router_gate.weight") == "--ignore router"


# Linears of known models: name in the block, outputs, inputs.
LINEARS = {
    "router or gate": [
        ("mlp.gate", 256, 7168),
        ("mlp.gate", 8, 64),
        ("block_sparse_moe.gate", 8, 4096),
        ("mlp.router", 16, 4096),
        ("ffn.router.layer", 16, 6144),
        ("mlp.gate.wg", 64, 4096),
        ("mlp.shared_expert_gate", 1, 2048),
        ("mlp.router_gate", 256, 1024),
    ],
    "narrow linear": [
        ("linear_attn.in_proj_a", 32, 2048),
        ("linear_attn.in_proj_ba", 64, 2048),
        ("self_attn.indexer.weights_proj", 64, 7168),
        ("mlstm_layer.igate_preact", 8, 4096),
    ],
    "": [
        ("mlp.gate_proj", 96, 64),
        ("mlp.gate", 5632, 2048),
        ("mlp.gate_up_proj", 192, 64),
        ("self_attn.k_proj", 64, 2048),
        ("self_attn.v_proj", 16, 64),
        ("mixer.x_proj", 80, 1536),
        ("self_attn.kv_a_proj_with_mqa", 576, 7168),
        ("mlp.experts.3.down_proj", 64, 32),
    ],
}


@pytest.mark.parametrize(
    ("what", "path", "rows", "columns"), [(w, *row) for w, rows in LINEARS.items() for row in rows]
)
def test_which_linears_are_small(what: str, path: str, rows: int, columns: int) -> None:
    assert why_small(path, rows, columns).partition(":")[0] == what


# -- what is ignored, as everybody writes it -----------------------------------------------------------
@pytest.mark.parametrize(
    "pattern",
    [
        *("down_proj", r"\.down_proj$", "re:.*down_proj", "*.down_proj", "glob:*.mlp.down_*"),
        *("model.layers.*.mlp.down_proj", "lm_head,down_proj", "lm_head, re:.*down_proj$", "re:.*lm_head,*.down_proj"),
    ],
)
def test_ignored_in_every_spelling(pattern: str, tiny_model: ModelOf) -> None:
    plan = plan_of(tiny_model("llama"), ignore=[pattern])
    left = {spec.module.rpartition(".")[2] for spec in plan.specs}
    assert left == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*lm_head", "*lm_head", "norm", "embed_tokens", "re:^lm_head$"])
def test_what_stays_dense_anyway_may_be_ignored(pattern: str, tmp_path: Path) -> None:
    for tied in (True, False):
        model = build(tmp_path / f"m{tied}", ARCHITECTURES["llama"], tie_word_embeddings=tied)
        assert len(plan_of(model, ignore=[pattern]).specs) == 21


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("down_prj", "'down_prj' matches no tensor; .*there are down_proj"),
        ("re:down_proj", "'re:down_proj' matches no tensor; .*there are down_proj"),
        ("*.attention", "matches no tensor; .*self_attn"),
        ("LlamaMLP", r"is the class of 3 x model\.layers\.\*\.mlp; name modules, not classes"),
        ("Linear", r"is the class of 3 x model\.layers\.\*\.self_attn\.q_proj, .*; name modules, not classes"),
        ("xyzzy", "matches no tensor; .*`llmquant plan` lists all names"),
    ],
)
def test_an_idle_pattern_gets_the_nearest_names(pattern: str, said: str, tiny_model: ModelOf) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_of(tiny_model("llama"), ignore=[pattern])


# -- group sizes that fit ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ({}, {32}),  # inputs of 64 and 96
        ({"rules": ["down_proj: group_size=-1"]}, {64, -1}),  # a rule sets that of 96
        ({"ignore": ["down_proj"]}, {64}),
        ({"format": "compressed-tensors,mlx,gguf"}, {32}),
    ],
)
def test_auto_is_the_largest_group_size_that_divides_what_it_decides(
    flags: dict[str, Any], sizes: set[int], tiny_model: ModelOf, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model("llama"), group_size="auto", **flags)
    assert {spec.scheme.group_size for spec in plan.specs} == sizes
    by_rule = [row.spec.scheme.group_size == -1 for row in plan.rows if row.spec]
    said = [row.reason.endswith("groups by --group-size auto") for row in plan.rows if row.spec]
    assert [not by for by in by_rule] == said
    recipe = make_recipe("x", flags={"eval_data": "none", "seq_len": 64, "samples": 2} | flags)
    found = estimate(tiny_model("llama"), recipe, RunOptions())
    largest = max(sizes)
    assert any(f"--group-size auto: {largest}," in problem.message for problem in found.problems)


def test_the_output_is_named_by_the_size_that_auto_found(tiny_model: ModelOf) -> None:
    stored = open_source(tiny_model("llama"))
    drawn = draft(stored, make_recipe("x"), RunOptions(), log=progress_of(SILENT))
    assert drawn.target.name.endswith("-W4A16-G32")
    assert drawn.recipe.group_size == 32
    assert drawn.chosen == {"group_size": "32, the largest of 128, 64, 32 that divides the inputs"}


def test_two_devices_can_share_a_large_model(tiny_model: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the 64 inputs of o_proj: groups of 32; down_proj, of which half is 48, is a rule's."""
    flags = {"group_size": "auto", "rules": ["down_proj: group_size=-1"]}
    assert {spec.scheme.group_size for spec in plan_of(tiny_model("llama"), **flags).specs} == {64, -1}
    monkeypatch.setattr("llmquant.treatments._SPLIT", 1)
    assert {spec.scheme.group_size for spec in plan_of(tiny_model("llama"), **flags).specs} == {32, -1}


def test_what_fits_no_group_or_format_is_refused_or_kept_with_what_servers_join_with_it(tmp_path: Path) -> None:
    one_head = build(tmp_path / "m", ARCHITECTURES["llama"], num_key_value_heads=1)
    with pytest.raises(FormatError, match=r"k_proj: 16 outputs, 64 inputs, no multiples .*--unfit keep"):
        plan_of(one_head, format="gptq")
    plan = plan_of(one_head, format="gptq", unfit="keep")
    assert {spec.module.rpartition(".")[2] for spec in plan.specs} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    reasons = {row.name.split(".")[-2]: row.reason for row in plan.rows if "self_attn" in row.name}
    assert reasons["k_proj"] == "16 outputs, 64 inputs, no multiples of 32 and 32 in gptq (--unfit keep)"
    assert "(--unfit keep)" in reasons["q_proj"]
    with pytest.raises(RecipeError, match=r"^3 x model\.layers\.\*\.mlp\.down_proj \(96\): .*32 or -1, or .* keep"):
        plan_of(one_head, group_size=64)
    with pytest.raises(RecipeError, match=r"use --group-size 32, or"):  # mlx holds no whole rows
        plan_of(one_head, group_size=64, format="mlx")
    plan = plan_of(one_head, group_size=64, unfit="keep")
    assert {spec.module.rpartition(".")[2] for spec in plan.specs}.isdisjoint({"down_proj"})
