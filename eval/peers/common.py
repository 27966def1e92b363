"""What the runners share: options, calibration tokens, a dense copy of a peer's result, and llmquant's scores of it.

A runner is a function `quantize(Job) -> {parameter name: dequantized weight_OI}`, handed to `main` below.
Shapes: O out_features, I in_features, G groups of a row.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.draft import draft_model
from llmquant.errors import SourceError
from llmquant.formats.packing import unpack_rows
from llmquant.log import SILENT, progress_of
from llmquant.memory import peak_rss
from llmquant.paths import expanded
from llmquant.plan import make_plan
from llmquant.recipe import Recipe
from llmquant.report.data import CompareReport, Evaluation
from llmquant.report.plain import parse_file
from llmquant.report.tables import describe_evaluation, lanes_table
from llmquant.source.base import Source
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import calibration_windows


@dataclass
class Job:
    """What a peer is given. `ids` are the calibration windows [n, T], the same for every peer and for llmquant."""

    source: Source
    tokenizer: Any
    ids: Tensor
    options: argparse.Namespace
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 0.0

    def load(self, dtype: str | torch.dtype = "auto") -> Any:
        """The original in transformers; `auto` is the checkpoint's own dtype, in which peers are used."""
        return AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=dtype)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the quantization alone: neither imports nor loading nor saving."""
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin


def option_parser(description: str | None, tool: str) -> argparse.ArgumentParser:
    """The options that all runners have; without --eval-*, llmquant's defaults for the model hold."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, prog=f"run_{tool}.py"
    )
    parser.add_argument("--model", default="demo", help="demo, or a local folder with safetensors")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--seed", type=int, default=0, help="chooses the calibration windows")
    parser.add_argument("--eval-data", help="auto, builtin, wikitext2, c4, FILE.txt, FILE.jsonl or a Hub id")
    parser.add_argument("--eval-tokens", type=lambda text: text if text == "full" else int(text))
    parser.add_argument("--eval-seq-len", type=int)
    parser.add_argument("--out", type=Path, help="folder of the dense result, new or empty")
    return parser


def main(
    tool: str,
    quantize: Callable[[Job], dict[str, Tensor]],
    parser: argparse.ArgumentParser,
    zero_bits: Callable[[int], int] = lambda bits: 0,
) -> None:
    """Run one peer: quantize, write the dense copy, print llmquant's table.

    `zero_bits(bits)`: the bits that the peer's format stores for a zero point, in addition to a scale of 16 bits.
    """
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("eval_data", "eval_tokens", "eval_seq_len")}
    flags = {"bits": options.bits, "group_size": options.group_size} | {k: v for k, v in given.items() if v is not None}
    recipe = llmquant.make_recipe(options.model, flags=flags)
    source = open_source("demo" if options.model == "demo" else expanded(options.model, SourceError).resolve())
    group = "channel" if options.group_size == -1 else f"G{options.group_size}"
    out = options.out or Path(f"{source.folder.name}-{tool}-W{options.bits}A16-{group}-dense")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: exists already")
    tokenizer = load_tokenizer(source)
    windows = calibration_windows(tokenizer, "builtin", options.samples, options.seq_len, options.seed)
    job = Job(source, tokenizer, windows.ids, options)
    # All linears of the blocks, experts included, but no router.
    skeleton = draft_model(source, recipe, progress_of(SILENT))
    ours = {row.name: row.shape for row in make_plan(skeleton.source, skeleton, recipe).rows if row.spec is not None}
    weights = quantize(job)
    peak = peak_rss()
    given = {name: tuple(weight_OI.shape) for name, weight_OI in weights.items()}
    if odd := sorted(dict(ours.items() ^ given.items())):
        raise SystemExit(f"{odd[0]} and {len(odd) - 1} others: quantized by {tool} and not by llmquant, or the reverse")
    write_dense(job, weights, out)

    evaluation = scored(out, source.folder, recipe)
    (original, reference), (_, lane) = evaluation.lanes.items()
    bits, count = bits_per_weight(weights, options.bits, options.group_size, zero_bits(options.bits))
    # By its settings: the dense copy's bits are 32.
    size = reference.bytes - int(count * (reference.bits_per_weight - bits) / 8)
    lane = replace(lane, bits_per_weight=bits, bytes=size)
    rows = lanes_table({original: reference, tool: lane})
    for row in rows:
        print("  ".join(cell.ljust(max(len(other[i]) for other in rows)) for i, cell in enumerate(row)).rstrip())
    print(f"on {describe_evaluation(evaluation)}; ± is one standard error")
    print(f"calibration {tuple(windows.ids.shape)}, ids sha256 {windows.as_dict()['ids_sha256'][:16]}")
    print(f"quantized in {job.seconds:.1f} s on {job.device}, {torch.get_num_threads()} threads", end=", ")
    print(f"peak memory until then {peak / 1e6:.0f} MB; wrote {out}")


def scored(out: Path, reference: Path, recipe: Recipe) -> Evaluation:
    """llmquant's scores, from a process of its own: some peers patch transformers' models."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        options = {
            "model": out,
            "reference": reference,
            "data": recipe.eval_data,
            "tokens": recipe.eval_tokens,
            "seq-len": recipe.eval_seq_len,
            "json": file,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        subprocess.run(
            [sys.executable, "-m", "llmquant", "eval", *flags, "--quiet"], check=True, stdout=subprocess.DEVNULL
        )
        return parse_file(CompareReport, file).evaluation


def bits_per_weight(weights: dict[str, Tensor], bits: int, group_size: int, zero_bits: int) -> tuple[float, int]:
    """Bits per weight by the settings, scales and zero points included, and the number of weights."""
    count = sum(weight_OI.numel() for weight_OI in weights.values())
    groups = sum(
        weight_OI.numel() // (weight_OI.shape[1] if group_size == -1 else group_size) for weight_OI in weights.values()
    )
    return bits + groups * (16 + zero_bits) / count, count


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a dense model that everybody quantizes, by parameter name: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {f"{name}.weight": module for name, module in model.named_modules() if module is not head}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def write_dense(job: Job, weights: dict[str, Tensor], out: Path) -> None:
    """The original in float32 (so that nothing is rounded again) with `weights` in it, and its tokenizer.

    Under the checkpoint's own names: experts that lie there one by one stay so.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: weights.get(name, job.source.read(name)).float().contiguous() for name in job.source.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(job.source.config | {"dtype": "float32"}, indent=2))
    for file in job.source.side_files():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.source.local(file), out / file)


def read_gptq(folder: str, bits: int) -> dict[str, Tensor]:
    """Dense float32 weights of a checkpoint in the GPTQ format (version 1: zero points are stored minus one)."""
    stored = {k: v for file in sorted(Path(folder).rglob("*.safetensors")) for k, v in load_file(file).items()}
    weights = {}
    for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        words_KO, scales_GO = stored[f"{name}.qweight"], stored[f"{name}.scales"].float()
        n_in, (n_groups, n_out) = words_KO.shape[0] * 32 // bits, scales_GO.shape
        codes_OI = unpack_rows(words_KO.T.contiguous(), bits, n_in).float()
        zeros_GO = unpack_rows(stored[f"{name}.qzeros"], bits, n_out).float() + 1
        group_I = stored.get(f"{name}.g_idx", torch.arange(n_in) // (n_in // n_groups)).long()
        weights[f"{name}.weight"] = ((codes_OI - zeros_GO.T[:, group_I]) * scales_GO.T[:, group_I]).contiguous()
    return weights
