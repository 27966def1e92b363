"""eval/tasks.py: lm-eval on checkpoints of ours, against scores worked out here; and the paired differences."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmquant

SCRIPT = Path(__file__).parents[1] / "eval" / "tasks.py"
QUESTIONS = [
    ("The captain of the ship", [" said that he would go", " green of to the", " wwww"], 0),
    ("She opened the door and", [" table table", " went in", " which the of and"], 1),
    ("He was a man of", [" great wealth", " the the", " an"], 0),
    ("It was a dark and", [" cold night", " elephants of", " cold morning of the year"], 2),
    ("The house stood", [" on a hill", " hill on a"], 1),
    ("In the morning they", [" ate", " eight apples, or seven", " left"], 2),
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}]
"""


def test_difference_and_its_error_by_hand() -> None:
    paired = runpy.run_path(str(SCRIPT))["paired"]
    a: dict[Any, Any] = {("t", "acc", "none"): {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}}
    b: dict[Any, Any] = {("t", "acc", "none"): {3: 1.0, 2: 0.0, 1: 1.0, 0: 0.0}}  # in another order
    (row,) = paired(a, b)
    gaps = np.array([-1.0, 1.0, -1.0, 0.0])
    assert (row["original"], row["quantized"], row["difference"]) == (0.75, 0.5, -0.25)
    assert math.isclose(row["difference_se"], gaps.std(ddof=1) / 2)
    assert row["changed"] == 0.75

    # A ratio whose weights are all the same is a mean; where loss is the same multiple of the weight, it has no error.
    words: dict[Any, Any] = {("t", "word_perplexity", "none"): {0: (-6.0, 2), 1: (-8.0, 2), 2: (-4.0, 2)}}
    worse: dict[Any, Any] = {("t", "word_perplexity", "none"): {0: (-7.0, 2), 1: (-8.0, 2), 2: (-6.0, 2)}}
    (row,) = paired(words, worse)
    assert (row["original"], row["difference"], row["unit"]) == (3.0, 0.5, "nats per word")
    assert math.isclose(row["difference_se"], np.array([0.5, 0.0, 1.0]).std(ddof=1) / math.sqrt(3))
    uneven: dict[Any, Any] = {("t", "word_perplexity", "none"): {0: (-2.0, 1), 1: (-20.0, 10)}}
    double: dict[Any, Any] = {("t", "word_perplexity", "none"): {0: (-4.0, 1), 1: (-40.0, 10)}}
    (row,) = paired(uneven, double)
    assert row["difference"] == 2.0
    assert row["difference_se"] == 0.0

    with pytest.raises(SystemExit, match="1 documents; expected the 4"):
        list(paired(a, {("t", "acc", "none"): {0: 1.0}}))


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_likelihood(model: Any, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        log_p: Tensor = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(before) - 1 + i, token]) for i, token in enumerate(after))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='needs lm-eval: pip install ".[tasks]"')
def test_tasks_over_local_json_against_our_own_scores(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, packed = tiny_model("llama"), tmp_path / "tiny-w4"
    recipe = llmquant.make_recipe("x", flags={"method": "rtn", "group_size": 32, "eval_data": "none"})
    llmquant.quantize(original, recipe, packed)

    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in ("choice", CHOICE), ("rolling", ROLLING):
        text = text.replace("DATA", str(data)).replace("CACHE", str(tmp_path / "cache"))
        (folder / f"{name}.yaml").write_text(text, "utf-8")
    call = [packed, original, "--reference", original, "--tasks", "tiny_choice,tiny_text", "--include", folder]
    call += ["--out", tmp_path / "rows.json", "--dtype", "float32", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, call)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = {(row["model"], row["metric"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert len(got) == 6

    tokenizer = AutoTokenizer.from_pretrained(original)
    expected = [expected_scores(model, tokenizer) for model in (dense(original), dense(packed))]
    for metric in ("acc", "acc_norm"):
        a, b = (scores[metric] for scores in expected)
        row = got[str(packed), metric]
        assert (row["original"], row["quantized"]) == (a.mean(), b.mean())
        assert row["difference_se"] == pytest.approx((b - a).std(ddof=1) / math.sqrt(len(a)))
        assert row["changed"] == (a != b).mean()
        assert f"| {row['original']:.4f} | {row['quantized']:.4f} | {row['difference']:+.4f} ±" in done.stdout
    words = sum(len(question.split()) for question, _, _ in QUESTIONS)
    a, b = (scores["loss"].sum() / words for scores in expected)
    row = got[str(packed), "word_perplexity"]
    assert row["original"] == pytest.approx(a, rel=1e-4)
    assert row["quantized"] == pytest.approx(b, rel=1e-4)
    assert row["difference"] == pytest.approx(b - a, rel=1e-2)
    assert row["difference"] != 0
    for metric in ("acc", "acc_norm", "word_perplexity"):
        assert (got[str(original), metric]["difference"], got[str(original), metric]["changed"]) == (0, 0)


def expected_scores(model: Any, tokenizer: Any) -> dict[str, Any]:
    """acc: the most likely choice is right; acc_norm: by characters; loss: of the question after <s>."""
    scores: dict[str, list[float]] = {"acc": [], "acc_norm": [], "loss": []}
    for question, choices, answer in QUESTIONS:
        before = tokenizer(question)["input_ids"]
        found = []
        for choice in choices:
            whole = tokenizer(question + choice)["input_ids"]
            assert whole[: len(before)] == before
            found.append(log_likelihood(model, before, whole[len(before) :]))
        by_length = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
        scores["acc"].append(float(np.argmax(found) == answer))
        scores["acc_norm"].append(float(np.argmax(by_length) == answer))
        scores["loss"].append(-log_likelihood(model, [tokenizer.bos_token_id], before))
    return {name: np.array(values) for name, values in scores.items()}
