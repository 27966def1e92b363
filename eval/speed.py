"""Where the time goes: python eval/speed.py [--make small|7b|8b | --model DIR] [--device cuda] [--repeat 3]

Seconds by stage of one quantization without evaluation, peak memory, and the ratio to the floor: the products that the
default cannot do without, timed as plain GEMM calls on the same shapes in the same process. These are the linears of
two calibration forwards (original and quantized), half a Gram product and the drift of every distinct input, each at
the fastest of float32 and bfloat16; and the solver's products of all rows with the Hessian (propagation, feedback,
sweeps, loss) at the fastest of float32. Weights are random; quality is not measured here.

On an accelerator a stage ends when the device has finished it, and its own peak memory is shown as well.

small: 2 blocks of 2048 x 5632, 32 query and 8 key heads.  7b: 32 blocks of 4096 x 11008 (13.5 GB on disk).
8b: 32 blocks of 4096 x 14336, 8 key heads (16 GB). `--blocks` makes a model with fewer.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import build

from llmquant.quant.hessian import default_propagation
from llmquant.quant.matmul import linear, matmul, sums_of
from llmquant.quant.solvers.refine import default_sweeps

SHAPES = {
    "small": {"hidden": 2048, "ffn": 5632, "blocks": 2, "heads": 32, "kv_heads": 8, "vocab": 4096},
    "7b": {"hidden": 4096, "ffn": 11008, "blocks": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8b": {"hidden": 4096, "ffn": 14336, "blocks": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
}
# Functions timed by name, outermost first; what one of them spends in another counts for the inner one only.
STAGES = {
    "start": ["pipeline:prepare", "pipeline:refuse_damaged_weights", "pipeline:compare_with_stock"],
    "kernels": ["pipeline:refuse_wrong_kernels"],
    "read": ["model.weights:Weights.load"],
    "forward": [
        "model.paused:Paused._go_on",
        "blocks.forwards:BlockForwards._advance",
        "model.skeleton:Skeleton.record",
    ],
    "gram": [f"quant.hessian:Hessian.{name}" for name in ("add", "mean", "take_drift", "take_residual")],
    "curvature": ["pipeline:measure_curvature"],
    "factor": ["quant.solvers.gptq:factor", "quant.solvers.gptq:row_feedback"],
    "propagate": ["quant.solvers.gptq:_target"],
    "grid": ["quant.solvers.gptq:search_grid"],
    "solve": ["quant.solvers.gptq:ldlq", "quant.solvers.gptq:two_sided_ldlq"],
    "refine": ["quant.solvers.gptq:refine"],
    "report": ["blocks.solve:measure"],
    "pack": ["formats.compressed_tensors:CompressedTensors.tensors"],
    "write": [
        "run_dir.tensor_files:TensorFiles.write",
        "run_dir.folder:RunDir.open_shards",
        "run_dir.tensor_files:TensorFiles.finish",
    ],
    "verify": ["output.containers:verify_output", "output.containers:verify_gguf"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", choices=list(SHAPES), default="small")
    parser.add_argument("--model", help="a folder (or demo) to time instead of a made-up model")
    parser.add_argument("--blocks", type=int, help="of a made-up model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="gptq", choices=["gptq", "rtn"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-ram", default="4GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments, *arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[arguments.make] | ({"blocks": arguments.blocks} if arguments.blocks else {})
        model = arguments.model or str(build(Path(folder) / "model", context=arguments.seq_len, **shape))
        runs = []
        for number in range(arguments.repeat):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", model, str(Path(folder) / str(number))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"run {number + 1}: {runs[-1]['total']:.1f} s, floor {runs[-1]['floor']:.1f} s", file=sys.stderr)
    median = sorted(runs, key=lambda run: run["total"])[len(runs) // 2]
    print(f"{arguments.model or arguments.make}, {arguments.method}, {arguments.samples} x {arguments.seq_len} tokens")
    print(f"{median['device']}, {median['machine']}, {median['threads']} threads, torch {torch.__version__}")
    for stage, seconds in median["stages"].items():
        print(f"{stage:>10} {seconds:8.2f} s {100 * seconds / median['total']:5.1f}%")
    of_device = f", of the device {median['device_mb']:.0f} MB" if median["device_mb"] else ""
    print(f"{'in all':>10} {median['total']:8.2f} s, peak memory {median['peak_mb']:.0f} MB{of_device}")
    if median["floor"]:
        ratio = statistics.median(run["total"] / run["floor"] for run in runs)
        print(f"{'floor':>10} {median['floor']:8.2f} s, ratio {ratio:.2f} (median of {len(runs)})")


def child(arguments: argparse.Namespace, model: str, out: str) -> None:
    """One quantization in a process of its own; prints a JSON line."""
    import llmquant

    device = torch.device(arguments.device)
    seconds = dict.fromkeys([*STAGES, "other"], 0.0)
    open_stages: list[str] = []
    for stage, names in STAGES.items():
        for name in names:
            _time(name, stage, seconds, open_stages, device)
    flags = {"method": arguments.method, "samples": arguments.samples, "seq_len": arguments.seq_len}
    flags["device"] = arguments.device
    recipe = llmquant.make_recipe(model, flags=flags | {"eval_data": "none"})
    begin = time.perf_counter()
    told = partial(print, file=sys.stderr, flush=True)
    report = llmquant.quantize(model, recipe, out, max_ram=arguments.max_ram, log=told)
    total = time.perf_counter() - begin
    device_peak = 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    seconds["other"] = total - sum(seconds.values())
    shapes = [row["shape"] for row in report.data["tensors"] if row["action"] == "quantized"]
    tokens = arguments.samples * arguments.seq_len
    floor = (
        floor_seconds(shapes, tokens, default_sweeps(recipe.bits, recipe.group_size), device)
        if arguments.method == "gptq"
        else 0.0
    )
    cost = {name: report.cost[name] for name in ("threads", "machine")}
    cost["peak_mb"] = report.cost["peak_rss_bytes"] / 1e6
    cost["device"], cost["device_mb"] = arguments.device, device_peak / 1e6
    print(json.dumps({"stages": seconds, "total": total, "floor": floor, **cost}))


def _wait(device: torch.device) -> None:
    """Until the device has done what it was asked for: an accelerator works behind the program."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _time(name: str, stage: str, seconds: dict[str, float], open_stages: list[str], device: torch.device) -> None:
    """Replace a function of the package by one that adds its own seconds, those of inner stages left out."""
    module_name, _, path = name.partition(":")
    owner: Any = importlib.import_module(f"llmquant.{module_name}")
    *parents, leaf = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function: Callable[..., Any] = getattr(owner, leaf)

    def timed(*args: Any, **kwargs: Any) -> Any:
        _wait(device)
        begin = time.perf_counter()
        open_stages.append(stage)
        try:
            return function(*args, **kwargs)
        finally:
            _wait(device)
            spent = time.perf_counter() - begin
            open_stages.pop()
            seconds[stage] += spent
            if open_stages:
                seconds[open_stages[-1]] -= spent

    if function in (table := importlib.import_module("llmquant.quant.solvers.gptq")._GRIDS).values():
        table.update({key: timed for key, value in table.items() if value is function})
    setattr(owner, leaf, timed)


def floor_seconds(shapes: list[list[int]], tokens: int, sweeps: int, device: torch.device) -> float:
    """Seconds of the products that a Llama's default cannot do without, each as the fastest GEMM of this machine."""
    outputs: dict[int, int] = {}
    for rows, columns in shapes:
        outputs[columns] = outputs.get(columns, 0) + rows
    wide = max(outputs)
    n_blocks = sum(columns == wide for _, columns in shapes)
    chunk, total = min(tokens, 4096), 0.0
    for width, rows in outputs.items():
        drift = default_propagation(tokens, width, wide=width == wide) > 0
        sizes = ((chunk, width), (min(rows, 8192), width), (width, width))
        x, weight, H = (torch.randn(size, device=device) for size in sizes)
        n_inputs = n_blocks * (1 if width == wide else 3)  # down; qkv, o and gate/up
        # The last block's output is not needed.
        needed = rows * (n_blocks - 1) / n_blocks if width == wide else rows
        halves = x.bfloat16(), weight.bfloat16()
        forward = fastest([lambda x=x, w=weight: linear(x, w), lambda halves=halves: halves[0] @ halves[1].T])
        gram = fastest([lambda x=x: x.T @ x]) * 0.5
        if drift:
            gram += fastest([lambda x=x: x.T @ x, lambda halves=halves: halves[0].T @ halves[0]])
        solver = fastest([lambda w=weight, H=H: matmul(w, H)], bf16=False) * (rows / len(weight))
        products = 0.5 + sweeps + 0.5  # feedback, sweeps, loss
        if drift:  # the weights with it, and two triangular solves of the weights' rows or of its own
            products += 1 + min(1, n_inputs * width / rows)
        total += (2 * forward * needed / len(weight) + gram * n_inputs) * tokens / chunk + solver * products
    return total


def fastest(products: list[Callable[[], Any]], *, bf16: bool = True) -> float:
    """Seconds of the fastest of some forms of a product, float32 factors also rounded to bfloat16."""
    medians = []
    for product in products:
        for precision in (torch.float32, torch.bfloat16) if bf16 else (torch.float32,):
            with sums_of(precision):
                times = []
                for _ in range(4):
                    begin = time.perf_counter()
                    _wait(product().device)
                    times.append(time.perf_counter() - begin)
            medians.append(statistics.median(times[1:]))
    return min(medians)


if __name__ == "__main__":
    main()
