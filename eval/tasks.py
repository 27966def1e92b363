"""lm-eval tasks on checkpoints, paired with the original's answers:
python eval/tasks.py MODEL... --reference ORIGINAL --tasks arc_easy,hellaswag [--include FOLDER] [--limit N]

Needs lm-eval: pip install -e ".[tasks]". Every checkpoint that llmquant reads is loaded dense, one after another: a
whole model must fit into memory. All models answer the same documents: the difference of a metric is taken
document by document, and its standard error is over documents. "changed" counts documents whose score is another one
than the original's: an accuracy can stay the same while many answers change.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmquant.checkpoint import open_checkpoint
from llmquant.model.devices import pick_device, pick_dtype
from llmquant.model.skeleton import Skeleton
from llmquant.text.tokenizer import load_tokenizer

Values = dict[tuple[str, str, str], dict[int, Any]]  # (task, metric, filter) -> document -> its value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--tasks", required=True, help="names, comma-separated")
    parser.add_argument("--include", help="a folder with task files of your own")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--fewshot", type=int, help="examples before each document [default: the task's own]")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="also write all rows to this JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    original = answers(arguments.reference, arguments)
    rows = []
    for model in arguments.models:
        rows += [{"model": str(model), **row} for row in paired(original, answers(model, arguments))]
    print(table(rows))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def answers(model: str, arguments: argparse.Namespace) -> Values:
    """The value of every metric for every document, by lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = open_checkpoint(model)
    device = pick_device(arguments.device)
    skeleton = Skeleton(source, device, pick_dtype(arguments.dtype, device, source))
    skeleton.weights.load(skeleton.weights.names)
    found: Any = simple_evaluate(
        HFLM(pretrained=skeleton.model, tokenizer=load_tokenizer(source), batch_size=arguments.batch_size),
        tasks=arguments.tasks.split(","),
        num_fewshot=arguments.fewshot,
        limit=arguments.limit,
        task_manager=TaskManager(include_path=arguments.include),
        bootstrap_iters=0,  # its unpaired standard errors are not used
    )
    values: Values = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                values.setdefault((task, metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return values


def paired(original: Values, other: Values) -> Iterator[dict[str, Any]]:
    """One row for each metric: both means, other - original, and the standard error of that difference.

    A plain metric is a number v_d of each document: mean v. lm-eval's perplexities over a corpus are pairs of
    (log-likelihood l_d, weight w_d in words or bytes): the loss -sum l / sum w, in nats; the standard error of a
    difference of such ratios is that of its linearisation, sqrt(n / (n - 1) sum (d_d - difference w_d)^2) / sum w.
    """
    for (task, metric, filter_name), first in original.items():
        second = other.get((task, metric, filter_name), {})
        if first.keys() != second.keys():
            raise SystemExit(f"{task}, {metric}: {len(second)} documents; expected the {len(first)} of the original")
        a, b = (_columns(values[document] for document in first) for values in (first, second))
        if a is None or b is None:
            continue  # nothing that can be subtracted document by document (texts for a corpus-wide BLEU)
        (a_value, weight), (b_value, _), n = a, b, len(first)
        gap, total = b_value - a_value, weight.sum()
        difference = float(gap.sum() / total)
        spread = float(np.square(gap - difference * weight).sum())
        yield {
            "task": task,
            "metric": metric if filter_name == "none" else f"{metric}, {filter_name}",
            "unit": _unit(metric, first),
            "documents": n,
            "original": float(a_value.sum() / total),
            "quantized": float(b_value.sum() / total),
            "difference": difference,
            "difference_se": math.sqrt(n / (n - 1) * spread) / float(total) if n > 1 else None,
            "changed": float((gap != 0).mean()),
        }


def _columns(values: Iterable[Any]) -> tuple[Any, Any] | None:
    """Values and weights, float64 [documents]; None where they are not numbers."""
    array = list(values)
    if all(isinstance(value, bool | int | float | np.number | np.bool_) for value in array):
        return np.array(array, np.float64), np.ones(len(array))
    if all(isinstance(value, tuple) and len(value) == 2 for value in array):
        both = np.array(array, np.float64)
        return -both[:, 0], both[:, 1]
    return None


def _unit(metric: str, values: dict[int, Any]) -> str:
    if isinstance(next(iter(values.values())), tuple):
        return "nats per byte" if "byte" in metric else "nats per word"
    return "log-likelihood" if metric == "perplexity" else ""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | task | metric | documents | original | quantized | difference | changed |", "|---" * 8 + "|"]
    for row in rows:
        error = "" if row["difference_se"] is None else f" ± {row['difference_se']:.4f}"
        metric = row["metric"] + (f" ({row['unit']})" if row["unit"] else "")
        lines.append(
            f"| {row['model']} | {row['task']} | {metric} | {row['documents']} | {row['original']:.4f} "
            f"| {row['quantized']:.4f} | {row['difference']:+.4f}{error} | {row['changed']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
