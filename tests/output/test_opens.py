"""Whether transformers opens an output is asked before the work: the answers are those of a load of real bytes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

import llmquant
from llmquant.errors import FormatError, VerifyError
from llmquant.export import export
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout
from llmquant.model.loads import load_empty, openers
from llmquant.output.check import verify_folder
from llmquant.output.check_files import check_config
from llmquant.output.opens import Opening, check_opens
from llmquant.preflight.estimate import estimate
from llmquant.quant.grid import QuantScheme
from llmquant.recipe import RunOptions
from llmquant.report.data import RunReport
from llmquant.report.plain import parse_file

RTN: dict[str, Any] = {"method": "rtn", "eval_data": "none", "group_size": 32}
# Classes whose initialization looks at the dense weight of a linear that is packed.
MENDED = {
    "gpt_bigcode": ("GPTBigCodeConfig", tiny.GPT2),
    "nanochat": ("NanoChatConfig", tiny.LLAMA),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "num_hidden_layers": 2, "state_size": 16, "n_groups": 1}
        | {"chunk_size": 32, "time_step_limit": (0.0, 1.0)},
    ),
}


def quantized(source: Path, out: Path, runtimes: tuple[str, ...] = (), **flags: Any) -> Path:
    recipe = llmquant.make_recipe(str(source), flags=RTN | flags)
    return llmquant.quantize(source, recipe, out, runtimes=runtimes).out or out


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def layout_of(folder: Path) -> Layout:
    tensors = load_file(folder / "model.safetensors")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny_model("llama"), tmp_path_factory.mktemp("packed") / "out")


def without(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], object]:
    return lambda tensors, told: tensors.pop(name)


LAYER = "model.layers.1.mlp"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], object], str]] = {
    "nothing": (lambda tensors, told: None, ""),
    "no norm": (without("model.norm.weight"), "leaves 1 parameter (model.norm.weight) random"),
    "no scales": (
        without(f"{LAYER}.up_proj.weight_scale"),
        "leaves 1 parameter (model.layers.*.mlp.up_proj.weight) random",
    ),
    "packed, but ignored": (
        lambda tensors, told: told["ignore"].append(f"{LAYER}.up_proj"),
        "leaves 1 parameter (model.layers.*.mlp.up_proj.weight) random",
    ),
    "dense, but not ignored": (
        lambda tensors, told: told["ignore"].remove("lm_head"),
        "leaves 1 parameter (lm_head.weight) random",
    ),
    "too many rows": (
        lambda tensors, told: tensors.update({"model.norm.weight": torch.ones(65)}),
        "expects another shape of 1 parameter (model.norm.weight)",
    ),
    "another group size": (
        lambda tensors, told: told["config_groups"]["group_0"]["weights"].update(group_size=64),
        "expects another shape of 21 parameters (model.layers.*.",
    ),
    "one that nobody knows": (
        lambda tensors, told: tensors.update({"model.extra.weight": torch.ones(2, 2)}),
        "has no place for 1 tensor (model.extra.weight)",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_trial_without_weights_says_what_a_load_says(
    what: str, packed: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    change, problem = CHANGES[what]
    tensors, config = load_file(packed / "model.safetensors"), config_of(packed)
    change(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    (opener,) = openers(config)
    found = load_empty(opener, layout_of(tmp_path))
    assert found.missing == info["missing_keys"]
    assert found.unexpected == info["unexpected_keys"]
    assert found.misfits == {name for name, _, _ in info["mismatched_keys"]}
    opening = check_opens(config, layout_of(tmp_path), layout_of(tiny_model("llama")))
    assert [text[: len(problem)] for text in opening.problems] == ([problem] if problem else [])


@pytest.mark.parametrize("name", MENDED)
def test_a_class_that_holds_no_packed_linears_is_given_dense_ones(name: str, tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "model", MENDED[name])
    out = quantized(source, tmp_path / "out")
    assert config_of(out)["quantization_config"]["dequantize"] is True
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    dense = AutoModelForCausalLM.from_pretrained(quantized(source, tmp_path / "fake", format="fake"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, dense.eval()(ids).logits)
    verify_folder(out, source)
    report = json.loads((out / "report.json").read_text())
    (note,) = report["runtimes"]["compressed-tensors"]["transformers"]["notes"]
    assert note.startswith('"dequantize" in the config makes all linears dense as they are loaded: its class fails at')
    assert note in (out / "README.md").read_text()
    assert config_of(export(out, "compressed-tensors", tmp_path / "again")) == config_of(out)


def test_linears_of_several_schemes_cannot_be_given_as_dense_ones(tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "model", MENDED["nanochat"])
    with pytest.raises(
        FormatError, match=r"in transformers 5.*: fails at AttributeError: 'Linear' object has no attri"
    ):
        quantized(source, tmp_path / "out", rules=["fc2: bits=8"])
    config = config_of(quantized(source, tmp_path / "out", ("vllm",), rules=["fc2: bits=8"]))
    assert "dequantize" not in config["quantization_config"]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers whose rules lead the codes of up_proj astray."""
    whole = conversion_mapping.get_checkpoint_conversion_mapping

    def get(name: str) -> Any:
        astray = [WeightRenaming("mlp.up_proj.weight_packed", "mlp.gate_proj.weight_packed")]
        return astray if name == "LlamaForCausalLM" else whole(name)

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", get)


@pytest.mark.usefixtures("lost")
def test_what_stock_transformers_leaves_random_is_refused_before_the_work(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source, problem = tiny_model("llama"), "leaves 3 parameters (model.layers.*.mlp.up_proj.weight) random"
    with pytest.raises(FormatError) as refused:
        quantized(source, tmp_path / "out")
    assert refused.value.got == problem
    assert str(refused.value).endswith("or name the runtimes that must open it with --for")
    assert not list(tmp_path.iterdir())
    found = estimate(source, llmquant.make_recipe(str(source), flags=RTN))
    assert (found.exit_code, found.opens["transformers"]) == (FormatError.exit_code, False)
    assert problem in next(p.message for p in found.problems if p.blocking)
    with pytest.raises(FormatError, match=f"--for transformers: transformers 5.* refuses: {re.escape(problem)}"):
        quantized(source, tmp_path / "out", ("transformers",))
    quantized(source, tmp_path / "fake", format="fake")


@pytest.mark.usefixtures("lost")
def test_who_names_other_runtimes_is_told_and_gets_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, problem = tiny_model("llama"), "leaves 3 parameters (model.layers.*.mlp.up_proj.weight) random"
    found = estimate(source, llmquant.make_recipe(str(source), flags=RTN), RunOptions(runtimes=("vllm",)))
    assert not found.exit_code
    assert [p.message for p in found.problems if problem in p.message]
    out = quantized(source, tmp_path / "out", ("vllm",))
    assert f"It does not open in transformers 5.23 ({problem}" in (out / "README.md").read_text()
    lines: list[str] = []
    again = export(out, "compressed-tensors", tmp_path / "again", log=lines.append)
    assert [line for line in lines if problem in line]
    assert problem in (again / "README.md").read_text()


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Qwen 3.5's kind: a text model in a class with a vision tower, and a head for several tokens that
    no class of transformers has."""
    folder = tmp_path_factory.mktemp("vision") / "model"
    text: dict[str, Any] = tiny.COMMON | tiny.LLAMA | {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": 512}
    text |= {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")} | {"linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    settings = transformers.Qwen3_5Config(text_config=text, vision_config=vision, vocab_size=512)
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(settings).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    mtp = {"fc": (64, 128), "layers.0.mlp.gate_proj": (96, 64), "layers.0.self_attn.q_proj": (64, 64), "norm": (64,)}
    tensors |= {f"mtp.{name}.weight": torch.randn(shape).bfloat16() for name, shape in mtp.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


OPENED_BY = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)


def test_text_model_and_vision_tower_open_by_either_class(with_vision: Path, tmp_path: Path) -> None:
    out = quantized(with_vision, tmp_path / "out", ignore=[r"layers\.0\.mlp\.down_proj"])
    for auto in OPENED_BY:
        model, info = auto.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        for name, module in auto.from_pretrained(with_vision).named_modules():
            if isinstance(module, torch.nn.Linear) and ("layers" not in name or "layers.0.mlp.down_proj" in name):
                assert torch.equal(model.get_submodule(name).weight, module.weight), name
    verify_folder(out, with_vision)
    rows, config = parse_file(RunReport, out / "report.json").tensors, config_of(out)
    ignored = config["quantization_config"].pop("ignore")
    assert len(ignored) < 8
    for entry in ignored:
        config["quantization_config"]["ignore"] = [other for other in ignored if other != entry]
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(VerifyError, match="ignore: does not name"):
            check_config(out, "compressed-tensors", rows)


def test_exact_names_would_open_in_one_class_only(with_vision: Path, tmp_path: Path) -> None:
    out = quantized(with_vision, tmp_path / "out")
    config, layout, original = config_of(out), layout_of(out), layout_of(with_vision)
    assert check_opens(config, layout, original) == Opening()
    told, names = config["quantization_config"], ["lm_head", "model.visual.merger.linear_fc1"]
    told["ignore"] = [entry for entry in told["ignore"] if "visual" not in entry] + names
    (problem,) = check_opens(config, layout, original).problems
    assert problem.startswith("leaves 9 parameters (model.visual.blocks.*.attn.proj.weight")


def test_what_transformers_says_of_the_original_is_no_fault_of_the_output(
    packed: Path, tiny_model: Callable[[str], Path]
) -> None:
    extra: Layout = {"mtp.fc.weight": (torch.bfloat16, (8, 8))}
    config, layout, original = config_of(packed), layout_of(packed), layout_of(tiny_model("llama"))
    assert check_opens(config, layout | extra, original | extra) == Opening()
    assert check_opens(config, layout | extra, original).problems


def test_merged_experts_must_have_the_scheme_that_they_are_unpacked_by() -> None:
    settings = transformers.Qwen3MoeConfig(
        **(tiny.COMMON | tiny.LLAMA), num_experts=4, moe_intermediate_size=32, head_dim=16
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(settings)
    stored = revert_weight_conversion(model, model.state_dict())
    original: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    fmt, specs, layout = FORMATS["compressed-tensors"], [], dict(original)
    for name, (dtype, (*_, columns)) in original.items():
        if name.endswith("_proj.weight"):
            scheme, (rows, _) = QuantScheme(4 if "experts" in name else 8, 32), layout.pop(name)[1]
            module = name.removesuffix(".weight")
            specs.append(LinearSpec(name, module, "Linear", (rows, columns), dtype, scheme))
            layout |= fmt.layout(specs[-1])
    dense = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    config = json.loads(settings.to_json_string(use_diff=False)) | {"architectures": ["Qwen3MoeForCausalLM"]}
    told = fmt.config(specs, dense)["quantization_config"]
    groups = told["config_groups"].items()
    # Experts are unpacked by the first group, whatever modules it names.
    for first, problems in ((4, ()), (8, ("takes bits and group size of others for 36 tensors",))):
        told["config_groups"] = dict(sorted(groups, key=lambda item: item[1]["weights"]["num_bits"] != first))
        opening = check_opens(config | {"quantization_config": told}, layout, original, specs)
        assert tuple(problem.partition(" (")[0] for problem in opening.problems) == problems
        assert opening.merged == ("" if problems else "36 of 48")


def test_a_class_that_cannot_be_built_without_weights_is_not_judged(
    packed: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    config, layout, original = config_of(packed), layout_of(packed), layout_of(tiny_model("llama"))
    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    opening = check_opens(config, layout, original)
    assert (opening.problems, opening.mended) == ((), ())
    assert "NotImplementedError: Cannot copy out of meta tensor" in opening.unchecked
    assert [finding.severity for finding in opening.findings] == ["warns"]
    assert check_opens(config | {"model_type": "unheard-of"}, layout, original).unchecked


@pytest.mark.parametrize("named", [None, 5, [], [None], ["PreTrainedModel"], ["pipeline"], ["BertModel"], ["no such"]])
def test_a_config_that_names_no_class_of_its_own_is_opened_by_an_auto_class(named: Any, packed: Path) -> None:
    assert [opener.name for opener in openers(config_of(packed) | {"architectures": named})] == ["LlamaForCausalLM"]


def test_a_trial_leaves_nothing_behind(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub.constants
    import transformers.core_model_loading as core
    import transformers.modeling_utils as utils

    def state() -> tuple[Any, ...]:
        own = (core._materialize_copy, utils.log_state_dict_report, huggingface_hub.constants.HF_HUB_OFFLINE)
        return (*own, transformers.logging.get_verbosity())

    before, config = state(), config_of(packed)
    config["quantization_config"]["ignore"] = []
    assert load_empty(openers(config)[0], layout_of(packed)).missing
    assert state() == before
    assert capfd.readouterr() == ("", "")
