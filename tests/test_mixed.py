"""Mixed bits in one checkpoint: through the pipeline, in every format that can say it, opened by its clients."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
import torch
from peers import dequantized
from safetensors.torch import load_file
from tiny import SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.cli.app import main
from llmquant.errors import FormatError, VerifyError
from llmquant.export import export
from llmquant.formats.facts import FACTS, formats_that
from llmquant.formats.packing import unpack_rows
from llmquant.output.check_files import check_config
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe
from llmquant.report.command import command_of
from llmquant.report.data import RunReport
from llmquant.report.plain import parse_file

ModelOf = Callable[[str], Path]
# 8 bits for down_proj, q, k and v of one block; groups of 64 in another; a solver of its own for one linear.
MIXED = ["down_proj: bits=8", "layers.1.*v_proj: bits=8, method=rtn", "glob:*.layers.2.self_attn.*: group_size=64"]
MIXABLE = formats_that(lambda facts: bool(facts.mixes))


def quantized(model: Path, out: Path, rules: Any = MIXED, **flags: Any) -> Path:
    llmquant.quantize(model, make_recipe("x", flags=SMALL | {"rules": rules} | flags), out)
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str], Path]]:
    """The model, and a mixed checkpoint of it in each format, made once."""
    root, made = tmp_path_factory.mktemp("mixed"), dict[str, Path]()
    model = tiny.build(root / "model", tiny.ARCHITECTURES["llama"])

    def of(name: str) -> Path:
        if name not in made:
            made[name] = quantized(model, root / name, format=name)
        return made[name]

    return model, of


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def facts_of(folder: Path) -> RunReport:
    return parse_file(RunReport, folder / "report.json")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["name"].removesuffix(".weight"): r for r in report_of(folder)["tensors"] if r["action"] == "quantized"}


@pytest.mark.parametrize("name", MIXABLE)
def test_mixed_bits_are_written_verified_and_read_back(
    name: str, mixed: tuple[Path, Callable[[str], Path]], tmp_path: Path
) -> None:
    model, of = mixed
    out = of(name)
    report, rows = report_of(out), rows_of(out)
    jsonschema.validate(report, json.loads((Path(__file__).parents[1] / "eval" / "report.schema.json").read_text()))
    found = {leaf: {(r["bits"], r["group_size"]) for n, r in rows.items() if leaf in n} for leaf in ("down", "q_proj")}
    assert found == {"down": {(8, 32)}, "q_proj": {(4, 32), (8, 32), (4, 64)}}
    assert rows["model.layers.1.self_attn.v_proj"]["method"] == "rtn"
    assert main(["verify", str(out), "--source", str(model)]) == 0
    lane = llmquant.evaluate(out, reference=model, recipe=make_recipe("x", flags=SMALL)).lanes[name]
    assert lane["kl_mean"] == pytest.approx(report["evaluation"]["lanes"]["llmquant"]["kl_mean"], rel=1e-6)
    plan = estimate(model, make_recipe("x", flags=SMALL | {"rules": MIXED, "format": name}), RunOptions(tmp_path / "p"))
    assert plan.bits_per_weight == report["bits_per_weight"]
    if not FACTS[name].dense:
        packed = open_checkpoint(out)
        assert isinstance(packed, PackedSource)
        widths = {key.removesuffix(".weight"): linear.bits for key, linear in packed.packed.items()}
        assert widths == {module: row["bits"] for module, row in rows.items()}


@pytest.mark.parametrize("name", ["gptq", "mlx"])
def test_an_export_of_mixed_bits_is_what_a_run_writes(
    name: str, mixed: tuple[Path, Callable[[str], Path]], tmp_path: Path
) -> None:
    out = export(mixed[1]("compressed-tensors"), name, tmp_path / "out")
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (mixed[1](name) / file).read_bytes()
    with pytest.raises(FormatError, match="8 bits in awq"):
        export(out if FACTS[name].exportable else mixed[1]("gptq"), "awq", tmp_path / "awq")


def test_gguf_of_an_export_holds_both_types(mixed: tuple[Path, Callable[[str], Path]], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = mixed[1]("gptq")
    (file,) = export(source, "gguf", tmp_path / "out").glob("*.gguf")
    rows, reference = rows_of(source), open_checkpoint(source)
    seen = set()
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in ("Q4_0", "Q8_0"):
            block, _, leaf = tensor.name.removeprefix("blk.").removesuffix(".weight").partition(".")
            stem = {"ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj", "attn_v": "self_attn.v_proj"}.get(leaf)
            if stem is None:
                continue
            name = f"model.layers.{block}.{stem}"
            assert tensor.tensor_type.name == {4: "Q4_0", 8: "Q8_0"}[rows[name]["bits"]]
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(dense, reference.read(f"{name}.weight").numpy())
            seen.add(tensor.tensor_type.name)
    assert seen == {"Q4_0", "Q8_0"}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "qwen3"])
def test_stock_transformers_opens_mixed_bits(architecture: str, tiny_model: ModelOf, tmp_path: Path) -> None:
    rules = ["(?:down_proj|dense_4h_to_h): bits=8", r"\.1\.: group_size=-1", r"\.0\..*(?:o_proj|dense)$: keep"]
    out = quantized(tiny_model(architecture), tmp_path / "out", rules, method="rtn", eval_data="none")
    groups = config_of(out)["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()].count(8) == 1
    assert len(groups) == 3
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, dequantized(tiny_model(architecture), out)(ids).logits)


def test_gptq_says_the_schemes_as_its_loaders_ask_for_them(mixed: tuple[Path, Callable[[str], Path]]) -> None:
    """GPTQModel and vLLM take the first pattern of `dynamic` that re.match finds; some servers ask by fused names."""
    out = mixed[1]("gptq")
    config, stored = config_of(out), load_file(out / "model.safetensors")
    reference = open_checkpoint(out)

    def told(module: str) -> tuple[int, int]:
        for pattern, entry in config["dynamic"].items():
            if re.match(pattern.removeprefix("+:"), module):
                return entry["bits"], entry["group_size"]
        return config["bits"], config["group_size"]

    for module, row in rows_of(out).items():
        bits, group = told(module)
        assert (bits, group) == (row["bits"], row["group_size"])
        codes = unpack_rows(stored[f"{module}.qweight"].T, bits, row["shape"][1]).float() - 2 ** (bits - 1)
        scales = stored[f"{module}.scales"].T.float().repeat_interleave(group, 1)
        assert torch.equal(codes * scales, reference.read(f"{module}.weight"))
        if (fused := {"q": "qkv_proj", "g": "gate_up_proj"}.get(module.rpartition(".")[2][0])) is not None:
            assert told(f"{module.rpartition('.')[0]}.{fused}") == (bits, group)
    assert told("model.layers.10.mlp.down_proj") == (4, 32)


def test_names_that_the_checkpoint_shortens_are_found_in_every_config(tiny_model: ModelOf, tmp_path: Path) -> None:
    """The BLOOM of its authors calls `transformer.h.0` `h.0`."""
    from safetensors.torch import save_file

    model = tiny.build(tmp_path / "bloom", tiny.ARCHITECTURES["bloom"])
    tensors = load_file(model / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, model / "model.safetensors", {"format": "pt"})
    weights: list[Tensor] = []
    for name in ("compressed-tensors", "gptq", "mlx"):
        out = quantized(
            model, tmp_path / name, ["h.1.mlp.dense_4h: bits=8"], format=name, method="rtn", eval_data="none"
        )
        packed = open_checkpoint(out)
        assert isinstance(packed, PackedSource)
        assert packed.packed["h.1.mlp.dense_4h_to_h.weight"].bits == 8
        weights.append(packed.read("h.1.mlp.dense_4h_to_h.weight"))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_mlx_unpacks_each_layer_by_its_own_entry(mixed: tuple[Path, Callable[[str], Path]]) -> None:
    mx: Any = pytest.importorskip("mlx.core", reason="needs mlx")
    out = mixed[1]("mlx")
    config, stored, reference = config_of(out), load_file(out / "model.safetensors"), open_checkpoint(out)
    for module in rows_of(out):
        entry = {"mode": "affine", "bits": config["bits"], "group_size": config["group_size"]} | config.get(module, {})
        words = mx.array(stored[f"{module}.weight"].numpy())
        scales, biases = (mx.array(stored[f"{module}.{part}"].float().numpy()) for part in ("scales", "biases"))
        dense = torch.from_numpy(np.array(mx.dequantize(words, scales, biases, **entry)))
        expected = reference.read(f"{module}.weight")
        torch.testing.assert_close(dense, expected, rtol=0, atol=float(expected.abs().max()) * 2**-22)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "mlx"])
def test_a_config_that_swaps_two_schemes_is_found(
    name: str, mixed: tuple[Path, Callable[[str], Path]], tmp_path: Path
) -> None:
    """Every width in it is one of the ledger's, but not of that linear."""
    config = json.loads((mixed[1](name) / "config.json").read_text())
    text = json.dumps(config["quantization_config"])
    bits = "num_bits" if "num_bits" in text else "bits"
    swapped = (
        text.replace(f'"{bits}": 8', "EIGHT").replace(f'"{bits}": 4', f'"{bits}": 8').replace("EIGHT", f'"{bits}": 4')
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": json.loads(swapped)}))
    with pytest.raises(VerifyError, match=r"config\.json: model\.layers.*8 bits in groups of"):
        check_config(tmp_path, name, facts_of(mixed[1](name)).tensors)


def test_a_mixed_run_that_was_stopped_goes_on_to_the_same_bytes_and_another_job_is_refused(
    mixed: tuple[Path, Callable[[str], Path]], tmp_path: Path
) -> None:
    model, of = mixed
    whole, out = of("compressed-tensors"), tmp_path / "out"

    def stop(line: str) -> None:
        if line.startswith("block 2/3"):
            raise KeyboardInterrupt

    def run(rules: list[str], log: Callable[[str], None]) -> None:
        recipe = make_recipe("x", flags=SMALL | {"rules": rules, "format": "compressed-tensors"})
        llmquant.quantize(model, recipe, out, log=log)

    with pytest.raises(KeyboardInterrupt):
        run(MIXED, stop)
    for other in ([], MIXED[:2]):
        with pytest.raises(llmquant.LLMQuantError, match=r"another job \(plan, .*recipe\.rules differ\)"):
            run(other, lambda line: None)
    run(MIXED, lambda line: None)
    for file in ("model.safetensors", "config.json", "report.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def test_linears_of_one_step_are_solved_by_scheme_and_solver(tiny_model: ModelOf, tmp_path: Path) -> None:
    """q, k and v share an input, hence a Hessian: those that a rule leaves alone get the codes they had without it."""
    model = tiny_model("llama")
    rules = ["layers.0.self_attn.v_proj: method=rtn"]
    flags = {"propagation": "auto", "passes": "block", "eval_data": "none", "curvature": "off"}
    ours, plain = quantized(model, tmp_path / "a", rules, **flags), quantized(model, tmp_path / "b", [], **flags)
    rounded = quantized(model, tmp_path / "c", [], method="rtn", eval_data="none")
    a, b, c = (load_file(folder / "model.safetensors") for folder in (ours, plain, rounded))
    for leaf in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{leaf}_proj.weight_packed"
        assert torch.equal(a[name], (c if leaf == "v" else b)[name])
    assert not torch.equal(a[name], b[name])
    layer = next(x for x in report_of(ours)["layers"] if x["name"] == "model.layers.0.self_attn.v_proj")
    assert layer["loss"] == pytest.approx(layer["rtn_loss"])


def test_no_calibration_where_rules_leave_nothing_to_it(tiny_model: ModelOf, tmp_path: Path) -> None:
    out = quantized(tiny_model("llama"), tmp_path / "a", ["proj: method=rtn"], eval_data="none")
    assert report_of(out)["calibration"] is None
    out = quantized(tiny_model("llama"), tmp_path / "b", ["v_proj: method=gptq"], method="rtn", eval_data="none")
    assert report_of(out)["calibration"] is not None


def test_report_card_and_command_show_the_rules(mixed: tuple[Path, Callable[[str], Path]]) -> None:
    out = mixed[1]("compressed-tensors")
    report, card = report_of(out), (out / "README.md").read_text()
    assert report["recipe"]["rules"] == MIXED
    assert "quantized to 4 and 8 bits" in card
    assert "- 4-bit\n- 8-bit\n" in card
    assert "--rule 'down_proj: bits=8' --rule" in command_of(facts_of(out))
    rows = rows_of(out)
    sizes = {name: row["shape"][0] * row["shape"][1] for name, row in rows.items()}
    bits = sum(size * (rows[name]["bits"] + 16 / rows[name]["group_size"]) for name, size in sizes.items())
    assert report["bits_per_weight"] == pytest.approx(bits / sum(sizes.values()))
    assert "8 bits, groups of 32" in (out / "report.html").read_text()


def test_the_command_line_takes_rules(
    tiny_model: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--model", str(tiny_model("llama")), "--group-size", "32", "--method", "rtn", "--eval-data", "none"]
    assert main(["plan", "--json", *command, "--rule", "v_proj: bits=8", "--rule", "down_proj: keep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["rules"] == ["v_proj: bits=8", "down_proj: keep"]
    assert {kind["bits"] for kind in found["kinds"] if "q_proj" in kind["name"]} == {8}
    assert main(["run", *command, "--rule", "v_proj: bits=9"]) == 2
    assert "rule 'v_proj': bits: '9'" in capsys.readouterr().err
    assert main(["run", *command, "--rule", "down_proj: bits=8", "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{tiny_model('llama').name}-W4A16-G32-mixed"]
