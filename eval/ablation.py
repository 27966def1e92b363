"""What each step of the default brings: python eval/ablation.py [--model demo] [--schemes 4:128 2:64] [--seeds 2]

Every row switches one step of the recipe off or to its other setting, quantizes, and scores the result on every text.
The figure after the divergence is its difference from the default, averaged over calibration seeds, with the standard
error of that average (over seeds; paired over windows where there is one seed only).
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import llmquant
from llmquant.recipe import PRESETS

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no curvature": {"curvature": "off"},
    "fast": PRESETS["fast"],
    "best": PRESETS["best"],
    "norms recovered": {"recover": "norms"},
    "scales recovered": {"recover": "scales"},
    "no error propagation": {"propagation": 0},
    "half error propagation": {"propagation": 0.5},
    "full error propagation": {"propagation": 1.0},
    "no residual target": {"residual": 0},
    "twice the residual target": {"residual": 1.33},
    "one pass per block": {"passes": "block"},
    "no curvature, no refinement": {"curvature": "off", "sweeps": 0},
    "no curvature, two sweeps": {"curvature": "off", "sweeps": 2},
    "no curvature, four sweeps": {"curvature": "off", "sweeps": 4},
    "no curvature, no scale refit": {"curvature": "off", "refit": False},
    "absmax grid": {"grid": "absmax"},
    "natural order": {"order": "natural"},
    "damping 0.01": {"damp": 0.01},
    "damping 0.03": {"damp": 0.03},
    "float32 products": {"products": "float32"},
    "round to nearest": {"method": "rtn"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--schemes", nargs="+", default=["4:128", "4:32", "3:128", "2:64"], help="bits:group_size")
    parser.add_argument("--texts", nargs="+", default=["builtin"], help="as --eval-data")
    parser.add_argument("--tokens", type=int, default=65536, help="scored of each text")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window, of calibration and evaluation")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    for scheme in arguments.schemes:
        bits, group = (int(part) for part in scheme.split(":"))
        job = {"bits": bits, "group_size": group, "samples": arguments.samples, "seq_len": arguments.seq_len}
        print(f"\n### {Path(arguments.model).name}, W{bits} g{group}\n")
        print("| variant | " + " | ".join(f"KL, {Path(t).stem} | difference" for t in arguments.texts) + " | s |")
        print("|---|" + "---|" * (2 * len(arguments.texts) + 1))
        rows = [run(arguments, job, seed) for seed in range(arguments.seeds)]
        for position, name in enumerate(arguments.variants):
            print(f"| {name} | " + " | ".join(cells(rows, position, len(arguments.texts))) + " |", flush=True)


def run(arguments: argparse.Namespace, job: dict[str, Any], seed: int) -> list[tuple[float, list[tuple[float, float]]]]:
    """For every variant: seconds of curvature, quantization and recovery; for every text (KL, standard error of KL -
    default's)."""
    with tempfile.TemporaryDirectory() as folder:
        outs, seconds = [], []
        for position, name in enumerate(arguments.variants):
            recipe = job | {"eval_data": "none", "seed": seed} | VARIANTS[name]
            outs.append(str(Path(folder) / str(position)))
            report = llmquant.quantize(arguments.model, llmquant.make_recipe(arguments.model, flags=recipe), outs[-1])
            seconds.append(
                sum(report.cost["seconds"].get(stage, 0.0) for stage in ("curvature", "quantize", "recover"))
            )
        scored = [score(arguments, outs, text) for text in arguments.texts]
    return [(second, [text[position] for text in scored]) for position, second in enumerate(seconds)]


def score(arguments: argparse.Namespace, outs: list[str], text: str) -> list[tuple[float, float]]:
    flags = {"eval_data": text, "eval_tokens": arguments.tokens, "eval_seq_len": arguments.seq_len}
    recipe = llmquant.make_recipe(arguments.model, flags=flags)
    report = llmquant.compare(outs, reference=arguments.model, recipe=recipe)
    kl = [lane["kl_mean"] for lane in list(report.lanes.values())[1:]]
    errors = [row["kl_difference_se"] for row in report.data["differences"][: len(outs) - 1]]  # pairs with the default
    return list(zip(kl, [0.0, *errors], strict=True))


def cells(rows: list[list[tuple[float, list[tuple[float, float]]]]], position: int, n_texts: int) -> list[str]:
    out = []
    for text in range(n_texts):
        kl = [row[position][1][text][0] for row in rows]
        gaps = [row[position][1][text][0] - row[0][1][text][0] for row in rows]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else rows[0][position][1][text][1]
        mean = statistics.mean(gaps)
        out += [f"{statistics.mean(kl):.5f}", "" if position == 0 else f"{mean:+.5f} ± {error:.5f}"]
    return [*out, f"{statistics.mean(row[position][0] for row in rows):.0f}"]


if __name__ == "__main__":
    main()
