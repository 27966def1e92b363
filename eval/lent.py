"""How much an expert should be lent: python eval/lent.py --model MODEL --texts FILE [FILE ...] [--lent 0 0.25 1 4]

An expert's Hessian is given LENT tokens per input dimension of what all experts of its layer read
(`llmquant/quant/hessian.py`). This quantizes with several values of it, at several sizes of the calibration text
(windows x tokens), and prints the KL on every text, its mean over calibration seeds. The figure after it is the
difference from the value that llmquant has, with the standard error over seeds, paired (over windows where there is one
seed only).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import llmquant
from llmquant.blocks import quantize as module
from llmquant.comparison import score_tokens
from llmquant.quant.hessian import LENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a mixture of experts")
    parser.add_argument("--texts", nargs="+", required=True, help="as --eval-data")
    parser.add_argument("--lent", type=float, nargs="+", default=[0, 0.25, 1, 4])
    parser.add_argument(
        "--sizes", nargs="+", default=["128x256", "16x128", "4x64"], help="calibration windows x tokens"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32768, help="scored of each text")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window of the evaluation")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    values = [LENT, *(value for value in arguments.lent if value != LENT)]
    for size in arguments.sizes:
        print(f"\n### {size} tokens, W{arguments.bits} g{arguments.group_size}, {arguments.seeds} seeds\n")
        print("| lent | " + " | ".join(f"KL, {Path(text).stem} | difference" for text in arguments.texts) + " |")
        print("|---|" + "---|" * (2 * len(arguments.texts)))
        runs = [kl_of_windows(arguments, size, seed, values) for seed in range(arguments.seeds)]
        for position, value in enumerate(values):
            cells = []
            for text in range(len(arguments.texts)):
                gaps = np.array([run[text][position] - run[text][0] for run in runs])  # [seeds, windows]
                kl = np.mean([run[text][position] for run in runs])
                single = gaps.mean(1) if len(gaps) > 1 else gaps[0]
                error = single.std(ddof=1) / len(single) ** 0.5
                cells += [f"{kl:.5f}", "" if position == 0 else f"{gaps.mean():+.5f} ± {error:.5f}"]
            print(f"| {value:g} | " + " | ".join(cells) + " |", flush=True)


def kl_of_windows(arguments: argparse.Namespace, size: str, seed: int, values: list[float]) -> list[list[np.ndarray]]:
    """For every text and every value of LENT, the mean KL of each window."""
    samples, seq_len = (int(part) for part in size.split("x"))
    flags: dict[str, Any] = {"bits": arguments.bits, "group_size": arguments.group_size, "eval_data": "none"}
    recipe = llmquant.make_recipe(
        arguments.model, flags=flags | {"samples": samples, "seq_len": seq_len, "seed": seed, "calibration": "builtin"}
    )
    with tempfile.TemporaryDirectory() as folder:
        outs = []
        for value in values:
            outs.append(str(Path(folder) / f"{value:g}"))
            with patch.object(module, "LENT", value):
                llmquant.quantize(arguments.model, recipe, outs[-1])
        return [scores(arguments, outs, text) for text in arguments.texts]


def scores(arguments: argparse.Namespace, outs: list[str], text: str) -> list[np.ndarray]:
    flags = {"eval_data": text, "eval_tokens": arguments.tokens, "eval_seq_len": arguments.seq_len}
    _, _, found = score_tokens(outs, arguments.model, llmquant.make_recipe(arguments.model, flags=flags))
    return [lane.kl.mean(1) for lane in list(found.values())[1:]]


if __name__ == "__main__":
    main()
