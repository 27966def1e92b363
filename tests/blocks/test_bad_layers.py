"""Weights and activations that break arithmetic: the layer is named, the policy applied, and every scale is finite."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant
from llmquant.errors import LLMQuantError, SolveError, SourceError
from llmquant.output.check import verify_folder
from llmquant.source.files import SINGLE
from llmquant.source.resolve import open_source

pytestmark = pytest.mark.usefixtures("short_runs")

TINY: dict[str, Any] = {
    "group_size": 32,
    "samples": 4,
    "seq_len": 32,
    "eval_tokens": 64,
    "eval_seq_len": 32,
    "baselines": "rtn",
}
MLP = "model.layers.1.mlp."
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def spoilt(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the tiny llama in float32 whose tensors were changed."""

    def spoil(change: Change) -> Path:
        folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
        tensors = {name: tensor.float() for name, tensor in load_file(folder / SINGLE).items()}
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return folder

    return spoil


def run(model: Path, out: Path, **flags: Any) -> dict[str, Any]:
    return llmquant.quantize(model, llmquant.make_recipe("x", flags=TINY | flags), out).data


def notes_of(report: dict[str, Any], module: str) -> list[str]:
    """The notes of a layer, which must also stand in its row of the ledger."""
    layer = next(layer for layer in report["layers"] if layer["name"] == module)
    row = next(row for row in report["tensors"] if row["name"] == f"{module}.weight")
    assert row.get("notes", []) == layer["notes"]
    return [str(note) for note in layer["notes"]]


def scales_are_finite(out: Path) -> None:
    source = open_source(out)
    names = [name for name in source.tensors if name.endswith(("scale", "scales"))]
    assert len(names) == 21
    for name in names:
        scale = source.read(name).float()
        assert torch.isfinite(scale).all(), name
        assert (scale != 0).all(), name


@pytest.mark.parametrize(("value", "method"), [(torch.nan, "gptq"), (-torch.inf, "rtn")])
def test_a_weight_that_is_not_finite_is_named_wherever_it_lies(
    spoilt: Callable[[Change], Path], tmp_path: Path, value: float, method: str
) -> None:
    model = spoilt(lambda tensors: None)
    whole = load_file(model / SINGLE)
    kinds = {name.replace(".1.", ".*."): name for name in whole if ".0." not in name and ".2." not in name}
    assert len(kinds) == 12
    for name in kinds.values():
        bad = whole | {name: whole[name].clone()}
        bad[name].view(-1)[-1] = value
        save_file(bad, model / SINGLE, metadata={"format": "pt"})
        flags = {"method": method, "eval_data": "none"} if method == "rtn" else {"method": method}
        with pytest.raises(SourceError, match=rf"^{name}: 1 NaN or Inf") as caught:
            run(model, tmp_path / "out", **flags)
        assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def overflowing(tensors: dict[str, Tensor]) -> None:
    """In float16, silu(gate) * up of one channel is Inf for some tokens."""
    tensors[MLP + "gate_proj.weight"][5] *= 1000
    tensors[MLP + "up_proj.weight"][5] *= 1000


def steep(tensors: dict[str, Tensor]) -> None:
    """Inputs are finite; their squares are not."""
    tensors["model.layers.1.input_layernorm.weight"][5] = 1e20


def huge(tensors: dict[str, Tensor]) -> None:
    tensors[MLP + "up_proj.weight"][5] *= 1e25


@pytest.mark.parametrize(
    ("change", "module", "said", "dtype"),
    [
        (overflowing, MLP + "down_proj", "non-finite activations", "float16"),
        (steep, "model.layers.1.self_attn.q_proj", "not positive definite", "float32"),
        (huge, MLP + "up_proj", "overflows float32", "float32"),
    ],
    ids=["activations", "Hessian", "weights"],
)
@pytest.mark.parametrize("passes", ["step", "block"])
def test_what_cannot_be_solved_ends_the_run_or_is_rounded(
    spoilt: Callable[[Change], Path], tmp_path: Path, change: Change, module: str, said: str, dtype: str, passes: str
) -> None:
    model, flags = spoilt(change), {"passes": passes, "dtype": dtype, "eval_data": "none"}
    with pytest.raises(SolveError, match=rf"{module}.*{said}.*--on-bad-layer rtn") as caught:
        run(model, tmp_path / "out", **flags)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    report = run(model, tmp_path / "out", **flags, on_bad_layer="rtn")  # goes on after the first block
    assert any(said in note for note in notes_of(report, module))
    assert not notes_of(report, "model.layers.0.mlp.down_proj")
    scales_are_finite(tmp_path / "out")
    assert verify_folder(tmp_path / "out", model).quantized == 21


def test_lanes_that_are_not_finite_are_an_error_or_counted(spoilt: Callable[[Change], Path], tmp_path: Path) -> None:
    model = spoilt(overflowing)
    try:
        report = run(model, tmp_path / "out", on_bad_layer="rtn", dtype="float16")
    except LLMQuantError as error:
        assert "NaN" in str(error) or "finite" in str(error)  # noqa: PT017
    else:
        assert report["evaluation"]["lanes"]["original"]["n_nonfinite"] > 0


def test_dead_channels_are_rounded_to_nearest_and_counted(spoilt: Callable[[Change], Path], tmp_path: Path) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        tensors[MLP + "up_proj.weight"][[3, 40, 95]] = 0

    model = spoilt(kill)
    report = run(model, tmp_path / "out", eval_data="none", propagation=0, format="fake")
    assert notes_of(report, MLP + "down_proj") == [
        "3 of 96 inputs are zero on all calibration tokens: rounded to nearest"
    ]
    before, after = (
        open_source(model).read(MLP + "down_proj.weight"),
        open_source(tmp_path / "out").read(MLP + "down_proj.weight"),
    )
    dead = [3, 40, 95]
    assert after[:, dead].abs().sum() > 0  # their weights are not thrown away
    error = (before - after)[:, dead].norm() / before[:, dead].norm()
    assert error < 0.2


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq", "mlx"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[MLP + "up_proj.weight"][7, :32].zero_(),
        lambda t: t[MLP + "up_proj.weight"].zero_(),
        lambda t: t[MLP + "up_proj.weight"].mul_(1e-30),
        lambda t: t[MLP + "up_proj.weight"].mul_(1e8),
        lambda t: t[MLP + "up_proj.weight"][:, 0].mul_(1e30),
    ],
    ids=["a group of zeros", "a layer of zeros", "tiny", "large", "huge"],
)
def test_scales_are_finite_and_not_zero_or_the_layer_is_named(
    spoilt: Callable[[Change], Path], tmp_path: Path, format_name: str, change: Change
) -> None:
    model = spoilt(change)
    flags = {"method": "rtn", "eval_data": "none", "format": format_name}
    try:
        run(model, tmp_path / "out", **flags)
    except LLMQuantError as error:
        assert "up_proj" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        scales_are_finite(tmp_path / "out")
        verify_folder(tmp_path / "out", model)


def test_fewer_tokens_than_inputs_can_be_solved(spoilt: Callable[[Change], Path], tmp_path: Path) -> None:
    """The Hessian is singular; damping is enough."""
    model = spoilt(lambda tensors: None)
    report = run(model, tmp_path / "out", samples=1, seq_len=2, eval_data="none")
    assert {layer["n_tokens"] for layer in report["layers"]} == {2}
    scales_are_finite(tmp_path / "out")
