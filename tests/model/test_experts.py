"""Experts taken apart: the same numbers as transformers' fused modules, the checkpoint's names, refusals by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
import llmquant.model.experts as experts_module
from llmquant.checkpoint import open_original
from llmquant.draft import draft
from llmquant.errors import FormatError, RecipeError, SourceError
from llmquant.log import SILENT, progress_of
from llmquant.model.experts import Experts, form_of
from llmquant.model.skeleton import Skeleton
from llmquant.output.check import verify_folder
from llmquant.plan import Plan
from llmquant.quant import matmul as products
from llmquant.recipe import RunOptions, make_recipe
from llmquant.source.resolve import open_source

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# name -> (config class, its arguments): each another form of experts, or another way in which they lie on disk
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", tiny.LLAMA | {"num_local_experts": 4}),  # one tensor for each expert, renamed
    "qwen3_moe": ("Qwen3MoeConfig", tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16}),
    "gpt_oss": (  # all in one, transposed, gate and up row by row, with biases
        "GptOssConfig",
        tiny.LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rope_parameters": ROPE},
    ),
    "llama4": (  # sorted tokens
        "Llama4TextConfig",
        tiny.LLAMA
        | {"num_local_experts": 4, "head_dim": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96}
        | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": None, "attention_chunk_size": 32},
    ),
    "jetmoe": (  # two modules of one projection each
        "JetMoeConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16}
        | {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (  # without a gate
        "NemotronHConfig",
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
        | {"layers_block_type": ["full_attention", "moe", "mlp"], "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny.build(tmp_path_factory.mktemp(name) / name, KINDS[name])
        return folders[name]

    return get


def plan_of(folder: Path, **flags: Any) -> Plan:
    recipe = make_recipe(str(folder), flags={"group_size": 32, "eval_data": "none"} | flags)
    return draft(open_source(folder), recipe, RunOptions(runtimes=("vllm",)), log=SILENT).plan


def logits(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    hidden = skeleton.embed(ids)
    for block in skeleton.blocks:
        with block.loaded():
            hidden = block.forward(hidden)
    with skeleton.head() as head:
        return head(hidden.flatten(0, 1))


@pytest.mark.parametrize("name", KINDS)
def test_the_model_computes_what_transformers_computes(
    name: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", None)
    folder, ids = built(name), torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(open_source(folder))
    assert any(isinstance(module, Experts) for module in skeleton.model.modules())
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        wanted = stock(ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits(skeleton, ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_expert_is_planned_and_no_router(name: str, built: Callable[[str], Path]) -> None:
    plan = plan_of(built(name))
    modules = {spec.module for spec in plan.specs}
    assert {number for m in modules if (number := m.split(".")[-2]).isdigit()} >= set("0123") or name == "jetmoe"
    assert not any("router" in m or m.endswith("mixer.gate") for m in modules)
    assert all(spec.key.endswith(".weight") for spec in plan.specs)


def test_experts_that_transformers_would_leave_random_are_refused_unless_others_open_them(
    built: Callable[[str], Path],
) -> None:
    recipe = make_recipe("x", flags={"group_size": 32, "eval_data": "none"})
    with pytest.raises(FormatError, match=r"leaves 12 parameters \(model\.layers\.\*\.mlp\.experts.* random; .*--for"):
        draft(open_source(built("gpt_oss")), recipe, RunOptions(), log=SILENT)
    said: list[str] = []
    draft(open_source(built("gpt_oss")), recipe, RunOptions(runtimes=("vllm",)), log=progress_of(said.append))
    assert any("leaves 12 parameters" in line for line in said)


def test_slices_are_those_of_the_fused_tensors(built: Callable[[str], Path]) -> None:
    folder = built("gpt_oss")
    stored, source = load_file(folder / "model.safetensors"), Skeleton(open_source(folder)).source
    layer = "model.layers.1.mlp.experts"
    up, bias = stored[f"{layer}.gate_up_proj"], stored[f"{layer}.gate_up_proj_bias"]
    assert torch.equal(source.read(f"{layer}.2.gate_proj.weight"), up[2].T[0::2])
    assert torch.equal(source.read(f"{layer}.2.up_proj.bias"), bias[2][1::2])
    assert torch.equal(source.read(f"{layer}.3.down_proj.weight"), stored[f"{layer}.down_proj"][3].T)
    assert source.origin(f"{layer}.3.down_proj.weight") == f"expert 3 of {layer}.down_proj"


def test_experts_that_are_kept_stay_as_they_are_stored(built: Callable[[str], Path]) -> None:
    plan = plan_of(built("gpt_oss"), ignore=["experts"])
    rows = {row.name: row for row in plan.rows}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].action == "copied"
    assert plan.layout["model.layers.0.mlp.experts.down_proj"] == (torch.bfloat16, (4, 96, 64))


def test_some_experts_of_a_layer_are_not_kept_alone(built: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"3 of the 12 linears of its experts are kept .*all experts of a layer, or"):
        plan_of(built("qwen3_moe"), ignore=[r"experts\.2\."])


def test_a_rule_for_one_projection_is_widened_to_all_experts(built: Callable[[str], Path]) -> None:
    plan = plan_of(built("qwen3_moe"), rules=["glob:*.experts.*.down_proj: bits=8"])
    assert {spec.scheme.bits for spec in plan.specs if ".experts." in spec.module} == {8}


def packed(folder: Path, target: Path, quantization: dict[str, Any], change: Callable[[str, Tensor], Any]) -> Path:
    """A copy of a checkpoint whose tensors `change` stores in another form."""
    shutil.copytree(folder, target)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    return target


def as_mxfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Random bytes of e2m1 with small exponents, as gpt-oss is published."""
    if tensor.ndim < 3:
        return {name: tensor}
    experts, columns, rows = tensor.shape
    generator = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(121, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def as_fp8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Blocks of 32 x 32 with a scale each, as DeepSeek is published."""
    if "_proj" not in name:
        return {name: tensor}
    scales = torch.full((-(-tensor.shape[0] // 32), -(-tensor.shape[1] // 32)), 0.25)
    return {name: tensor.mul(4).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


PACKED: dict[str, tuple[str, dict[str, Any], Callable[[str, Tensor], Any]]] = {
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": []}, as_mxfp4),
    "fp8": ("qwen3_moe", {"quant_method": "fp8", "weight_block_size": [32, 32]}, as_fp8),
}


@pytest.mark.parametrize("form", PACKED)
def test_packed_experts_are_read_one_by_one(form: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    kind, quantization, change = PACKED[form]
    source = open_original(packed(built(kind), tmp_path / "packed", quantization, change))
    dense = {name: source.read(name).to(torch.bfloat16) for name in source.tensors}
    shutil.copytree(built(kind), tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(2))
    assert torch.equal(logits(Skeleton(source), ids), logits(Skeleton(open_source(tmp_path / "dense")), ids))


@pytest.mark.parametrize("form", PACKED)
def test_a_run_from_packed_experts(form: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    kind, quantization, change = PACKED[form]
    folder = packed(built(kind), tmp_path / "packed", quantization, change)
    recipe = make_recipe(str(folder), flags=tiny.SMALL)
    report = llmquant.quantize(folder, recipe, out=tmp_path / "out", runtimes=("vllm",))
    checked = verify_folder(tmp_path / "out", folder)
    assert checked.quantized == sum(".experts." in row.name for row in report.facts.tensors if row.scheme) + 4 * 3
    assert {layer.n_tokens for layer in report.facts.layers if ".experts." not in layer.name} == {4 * 32}
    seen = [layer.n_tokens for layer in report.facts.layers if layer.name.endswith("layers.1.mlp.experts.0.up_proj")]
    assert 0 < seen[0] < 4 * 32


@pytest.mark.parametrize("change", ["missing", "too many", "wider"])
def test_experts_that_do_not_fit_the_config_are_refused(
    change: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in built("qwen3_moe").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "too many":
        tensors[name.replace("experts.3", "experts.4")] = tensors[name].clone()
    else:
        tensors[name] = torch.zeros(64, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.experts.*expected"):
        Skeleton(open_source(folder))


def test_another_gate_is_refused_before_any_work(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built("qwen3_moe")
    monkeypatch.setattr(Experts, "_activation", lambda self, x: x, raising=True)
    monkeypatch.setattr(experts_module.Experts, "_activated", lambda self, e, x: e[self.ups[0]](x))
    with pytest.raises(SourceError, match="experts of an unknown form"):
        Skeleton(open_source(folder))


def test_a_linear_layer_is_no_form_of_experts() -> None:
    assert form_of(torch.nn.Linear(8, 8)) is None
    assert form_of(torch.nn.Conv1d(8, 8, 3)) is None
