"""A head and an embedding that are quantized: what a run scores is what every reader of the result computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import TINY, files, killed_after, run, weights
from peers import LlamaCpp, dequantized, divergence, log_probs
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import recovery
from llmquant.cli.app import main
from llmquant.errors import FormatError, RecipeError
from llmquant.export import export
from llmquant.model.skeleton import Skeleton
from llmquant.output.check import verify_folder
from llmquant.preflight.estimate import estimate
from llmquant.recipe import make_recipe
from llmquant.source.resolve import open_source

pytestmark = pytest.mark.usefixtures("short_runs")
IDS = torch.randint(5, 4000, (48,), generator=torch.Generator().manual_seed(0))
FLAGS: dict[str, Any] = {"eval_data": "builtin", "baselines": "none", "dtype": "float32", "curvature": "off"}
POOR: dict[str, Any] = {"bits": 2, "grid": "absmax", "propagation": 0, "sweeps": 0}  # scales that leave much to gain
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """The ledger by name."""
    return {row["name"]: row for row in report(out)["tensors"]}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head of a Qwen2 is its embedding."""
    folder = tmp_path_factory.mktemp("tied") / "qwen2"
    return tiny.build(folder, tiny.ARCHITECTURES["qwen2"], tie_word_embeddings=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def untied(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def read_again(source: Path, out: Path, seq_len: int = 64) -> float:
    recipe = make_recipe("x", flags=TINY | FLAGS | {"eval_seq_len": seq_len})
    found = llmquant.compare([out], reference=source, recipe=recipe)
    kl: float = found.lanes[out.name]["kl_mean"]
    return kl


def assert_read_alike(source: Path, out: Path) -> None:
    """The run's own figure is that of the finished checkpoint, as a reader finds it, in a model of its own."""
    ours = report(out)["evaluation"]["lanes"]["llmquant"]["kl_mean"]
    assert ours == pytest.approx(read_again(source, out), rel=1e-4)
    assert ours > 0
    verify_folder(out, source)


# -- what is written -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mlx", "gguf", "fake"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_and_the_head_that_is_tied_to_it(name: str, bits: int, tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tied, out, format=name, embed_bits=bits, **FLAGS)
    row = rows(out)[f"{EMBEDDING}.weight"]
    assert (row["action"], row["bits"], row["reason"]) == ("quantized", bits, f"--embed-bits {bits}")
    assert_read_alike(tied, out)


@pytest.mark.parametrize("name", ["compressed-tensors", "mlx", "gguf", "fake"])
def test_a_head_of_its_own(name: str, untied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(untied, out, format=name, lm_head_bits=8, **FLAGS)
    row = rows(out)[f"{HEAD}.weight"]
    assert (row["action"], row["bits"]) == ("quantized", 8)
    assert rows(out)[f"{EMBEDDING}.weight"]["action"] == "copied"
    layer = report(out)["layers"][0]
    assert (layer["name"], layer["loss"]) == (HEAD, None)
    assert 0 < layer["weight_error"] < 1e-4
    assert_read_alike(untied, out)


def test_each_alone_and_both(untied: Path, tmp_path: Path) -> None:
    """Both cost what is lost in both places."""
    found = {}
    for name, flags in {
        "none": {},
        "head": {"lm_head_bits": 8},
        "embedding": {"embed_bits": 4},
        "both": {"lm_head_bits": 8, "embed_bits": 4},
    }.items():
        run(untied, tmp_path / name, format="mlx", **FLAGS | flags)
        found[name] = report(tmp_path / name)["evaluation"]["lanes"]["llmquant"]["kl_mean"]
    assert len(set(found.values())) == 4
    assert rows(tmp_path / "both")[f"{EMBEDDING}.weight"]["bits"] == 4
    assert rows(tmp_path / "both")[f"{HEAD}.weight"]["bits"] == 8
    assert_read_alike(untied, tmp_path / "both")


def test_stock_transformers_runs_the_packed_head(untied: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    out = tmp_path / "out"
    run(untied, out, bits=8, lm_head_bits=8, **FLAGS | {"eval_data": "none"})
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert "weight_packed" in dict(theirs.lm_head.named_parameters()) | dict(theirs.lm_head.named_buffers())
    ours = dequantized(untied, out)
    assert (log_probs(ours, IDS) - log_probs(theirs, IDS)).abs().max() < 1e-5
    dense = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    assert not torch.equal(ours.lm_head.weight, dense.lm_head.weight)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_mlx_lm_computes_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="needs mlx-lm")
    mx = pytest.importorskip("mlx.core")
    source, out = request.getfixturevalue(name), tmp_path / "out"
    run(source, out, format="mlx", embed_bits=8, **FLAGS | {"eval_data": "none"})
    model, _ = utils.load_model(out)
    assert type(model.model.embed_tokens).__name__ == "QuantizedEmbedding"
    model.set_dtype(mx.float32)
    theirs = torch.tensor(model(mx.array(IDS[None].numpy()))[0].tolist())
    assert (dequantized(source, out)(IDS[None]).logits[0] - theirs).abs().max() < 1e-5


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny.DEMO, out, format="gguf", embed_bits=4, **FLAGS | {"eval_data": "none"})
    (file,) = out.glob("*.gguf")
    llama, at = LlamaCpp(file), list(range(3, 48, 5))
    ours = log_probs(dequantized(tiny.DEMO, out), IDS)[at]
    original = log_probs(AutoModelForCausalLM.from_pretrained(tiny.DEMO, dtype=torch.float32), IDS)[at]
    theirs = torch.stack([llama.log_probs(IDS[: t + 1].tolist(), 4096) for t in at])
    assert divergence(ours, theirs) < 0.1 * divergence(original, ours)


# -- with the rest -------------------------------------------------------------------------------------
def test_an_interrupted_run_goes_on(untied: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"format": "mlx", "embed_bits": 4, "lm_head_bits": 8}
    run(untied, tmp_path / "out", **flags)
    wanted = files(tmp_path / "out")
    for blocks in (1, 2):
        again = tmp_path / str(blocks) / "out"
        killed_after(blocks, untied, again, **flags)
        run(untied, again, resume="required", **flags)
        assert files(again) == wanted


def test_what_is_trained_behind_it_reads_it_so(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery sees the embedding and the head as they are written: the figures of both lanes are the readers'."""
    monkeypatch.setattr(recovery, "_STEP_TOKENS", 384)
    monkeypatch.setattr(recovery, "_VECTORS_RATE", 0.02)
    monkeypatch.setattr(recovery, "_HELD_OUT", 4)
    flags = FLAGS | POOR | {"format": "mlx", "embed_bits": 4, "samples": 32}
    run(tied, tmp_path / "before", **flags)
    run(tied, tmp_path / "out", recover="norms", **flags)
    lanes = report(tmp_path / "out")["evaluation"]["lanes"]
    assert lanes["before recovery"] == report(tmp_path / "before")["evaluation"]["lanes"]["llmquant"]
    found = report(tmp_path / "out")["recovery"]
    assert found["step"] > 0
    assert found["kl_after"] < found["kl_before"]
    assert_read_alike(tied, tmp_path / "out")


def test_finetune_takes_them_over(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_STEP_TOKENS", 64)
    flags = FLAGS | {"lm_head_bits": 8, "samples": 8, "eval_data": "none"}
    run(untied, tmp_path / "once", recover="all", **flags)
    run(untied, tmp_path / "out", **flags)
    llmquant.finetune(tmp_path / "out", reference=untied, out=tmp_path / "tuned", recover="all")
    assert weights(tmp_path / "tuned") == weights(tmp_path / "once")


def test_exported_with_the_head(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(untied, out, lm_head_bits=8, **FLAGS)
    export(out, "mlx", tmp_path / "mlx")
    assert_read_alike(untied, tmp_path / "mlx")
    assert main(["export", str(out), "--format", "gptq", "--out", str(tmp_path / "gptq"), "--quiet"]) != 0
    assert "gptq does not hold lm_head quantized" in capsys.readouterr().err.replace("\n", " ")


def test_a_target_counts_them(untied: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"curvature": "auto", "lm_head_bits": 8, "samples": 8, "eval_data": "none"}
    run(untied, tmp_path / "out", target_bpw=7.5, **flags)
    found = report(tmp_path / "out")
    assert found["bits_per_weight"] <= 7.5
    assert rows(tmp_path / "out")[f"{HEAD}.weight"]["bits"] == 8


def test_parked_forwards_begin_and_end_with_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = tiny_model("gemma4"), tmp_path / "out"
    run(source, out, format="fake", embed_bits=4, **FLAGS | {"seq_len": 32, "eval_seq_len": 32})
    ours = report(out)["evaluation"]["lanes"]["llmquant"]["kl_mean"]
    assert ours == pytest.approx(
        read_again(source, out, 32), rel=0.02
    )  # dense weights of bfloat16 are rounded once more


def test_plan_names_them_and_counts_their_memory(untied: Path) -> None:
    plain = estimate(untied, make_recipe("x", flags=TINY))
    found = estimate(untied, make_recipe("x", flags=TINY | {"format": "mlx", "embed_bits": 8, "lm_head_bits": 8}))
    assert found.memory["largest of them that is quantized"] == 20 * 4096 * 64
    assert found.output_bytes < plain.output_bytes


# -- refused -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_format_that_holds_no_such_head(name: str, untied: Path, tmp_path: Path) -> None:
    message = rf"--lm-head-bits: {name} does not hold lm_head quantized; expected compressed-tensors or mlx or gguf"
    with pytest.raises(FormatError, match=message):
        run(untied, tmp_path / "out", format=name, lm_head_bits=8)


def test_a_server_that_would_take_it_for_dense(untied: Path, tmp_path: Path) -> None:
    plan = estimate(untied, make_recipe("x", flags=TINY | {"lm_head_bits": 8}))
    assert {name: plan.opens[name] for name in ("vllm", "sglang")} == {"vllm": True, "sglang": False}


def test_one_format_of_several(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"--embed-bits: compressed-tensors does not hold model.embed_tokens"):
        run(untied, tmp_path / "out", format="compressed-tensors,gguf", embed_bits=8)


def test_a_head_that_is_the_embedding(tied: Path, tmp_path: Path) -> None:
    message = "--lm-head-bits: lm_head.weight is tied to model.embed_tokens.weight; use --embed-bits"
    with pytest.raises(RecipeError, match=message):
        run(tied, tmp_path / "out", lm_head_bits=8)


@pytest.mark.parametrize(("flag", "value"), [("lm_head_bits", 4), ("embed_bits", 2), ("embed_bits", True)])
def test_other_widths(flag: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"--{flag.replace('_', '-')}|recipe: {flag}"):
        make_recipe("x", flags={flag: value})


def test_an_ignored_head_stays(untied: Path, tmp_path: Path) -> None:
    run(untied, tmp_path / "out", lm_head_bits=8, ignore=["lm_head"], **FLAGS | {"eval_data": "none"})
    row = rows(tmp_path / "out")[f"{HEAD}.weight"]
    assert (row["action"], row["reason"]) == ("copied", "--ignore lm_head")


def test_two_heads_of_one_model(untied: Path) -> None:
    """Oracle: torch's own product with each weight."""
    skeleton = Skeleton(open_source(untied))
    hidden, other = torch.randn(5, 64), torch.randn(4096, 64)
    with skeleton.heads({f"{HEAD}.weight": other, f"{EMBEDDING}.weight": other}) as (original, changed):
        before = original(hidden)
        normed = torch.nn.functional.linear(skeleton.model.model.norm(hidden), other)
        assert torch.allclose(changed(hidden), normed, atol=1e-5)
        assert torch.equal(original(hidden), before)
        assert not torch.equal(changed(hidden), before)
