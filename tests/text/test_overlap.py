"""Evaluation text that was calibrated on is refused; mixtures of calibration texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llmquant
from llmquant.cli.app import main
from llmquant.demo import DEMO
from llmquant.errors import CalibrationError
from llmquant.source.resolve import open_source
from llmquant.text.mixture import parse_mixture, split_samples
from llmquant.text.overlap import RUN, overlap, refuse_overlap
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import calibration_windows

SMALL = [
    *("--samples", "4", "--seq-len", "64", "--eval-tokens", "128", "--eval-seq-len", "64", "--group-size", "32"),
    *("--baselines", "none"),
]


def brute_force(calibration: torch.Tensor, evaluation: torch.Tensor, run: int) -> float:
    theirs = {tuple(row[i : i + run]) for row in calibration.tolist() for i in range(len(row) - run + 1)}
    covered = 0
    for row in evaluation.tolist():
        seen = [False] * len(row)
        for i in range(len(row) - run + 1):
            if tuple(row[i : i + run]) in theirs and len(set(row[i : i + run])) >= min(8, run):
                seen[i : i + run] = [True] * run
        covered += sum(seen)
    return covered / evaluation.numel()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(2, 9))
def test_overlap_is_that_of_a_search_by_hand(seed: int, run: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calibration = torch.randint(kinds, (3, 12), generator=generator)
    evaluation = torch.randint(kinds, (4, 9), generator=generator)
    assert overlap(calibration, evaluation, run) == pytest.approx(brute_force(calibration, evaluation, run))


def test_one_shared_passage_is_found_wherever_it_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(30000, (8, 256), generator=generator)
    evaluation = torch.randint(30000, (8, 200), generator=generator)
    assert refuse_overlap(calibration, evaluation, ("a", "b")) == 0
    evaluation[5, 17 : 17 + RUN + 8] = calibration[2, 100 : 100 + RUN + 8]
    assert overlap(calibration, evaluation) == (RUN + 8) / evaluation.numel()
    with pytest.raises(CalibrationError, match=r"--calibration a, --eval-data b: 2\.5% of the evaluation tokens"):
        refuse_overlap(calibration, evaluation, ("a", "b"))


def test_rows_of_dots_and_short_windows_are_no_overlap() -> None:
    dots = torch.full((2, 64), 7)
    assert overlap(dots, dots) == 0
    short = torch.arange(40).view(2, 20)
    assert overlap(short, short) == 0


def test_the_demos_own_texts_do_not_overlap() -> None:
    tokenizer = load_tokenizer(open_source("demo"))
    calibration = calibration_windows(tokenizer, "builtin", 128, 512, 0).ids
    heldout = torch.tensor(tokenizer((DEMO / "heldout.txt").read_text("utf-8"))["input_ids"])
    assert overlap(calibration, heldout[: 64 * 512].view(64, 512)) == 0


def test_a_run_on_its_own_evaluation_text_is_refused(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same.txt").write_text((DEMO / "heldout.txt").read_text("utf-8")[:1500], "utf-8")
    words = ["run", "--model", str(tiny_model("llama")), "--out", "out", *SMALL]
    assert main([*words, "--calibration", "same.txt", "--eval-data", "same.txt"]) == 5
    assert "of the evaluation tokens are in the calibration windows" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["same.txt"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("a,b", "'a' has no share"),
        ("a:0.5,b:0.6", "shares add up to 1.1"),
        ("a:0.5,a:0.5", "twice the same"),
        (":0.5,b:0.5", "without a name"),
        ("a:1.5,b:-0.5", "not above zero"),
        ("a:nan,b:1", "not above zero"),
    ],
)
def test_bad_mixtures_are_refused(spec: str, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        parse_mixture(spec)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=6), st.integers(6, 300))
def test_samples_are_shared_out_whole(weights: list[int], samples: int) -> None:
    parts = [(str(i), weight / sum(weights)) for i, weight in enumerate(weights)]
    counts = split_samples(parts, samples)
    assert sum(counts) == samples
    assert min(counts) >= 1
    assert all(
        abs(n - share * samples) < 1 or n == 1 or samples < 100 for n, (_, share) in zip(counts, parts, strict=True)
    )


def test_a_mixture_takes_its_windows_from_each_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_source("demo"))
    notes = tmp_path / "notes.txt"
    notes.write_text((DEMO / "heldout.txt").read_text("utf-8")[:20000], "utf-8")
    mixed = calibration_windows(tokenizer, f"builtin:0.75,{notes}:0.25", 8, 64, 3)
    assert mixed.ids.shape == (8, 64)
    assert mixed.dataset == "builtin:6,notes.txt:2"
    assert torch.equal(mixed.ids[:6], calibration_windows(tokenizer, "builtin", 6, 64, 3).ids)
    assert torch.equal(mixed.ids[6:], calibration_windows(tokenizer, str(notes), 2, 64, 3).ids)
    with pytest.raises(CalibrationError, match="at least one window for each of 2"):
        calibration_windows(tokenizer, f"builtin:0.75,{notes}:0.25", 1, 64, 3)


def test_a_run_reports_its_mixture(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text((DEMO / "heldout.txt").read_text("utf-8")[-20000:], "utf-8")
    flags = {"calibration": f"builtin:0.5,{notes}:0.5", "samples": 4, "seq_len": 64, "group_size": 32}
    flags |= {"eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 64, "baselines": "none"}
    report = llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=flags), tmp_path / "out")
    assert report.data["calibration"]["dataset"] == "builtin:2,notes.txt:2"
