"""What the lanes cost: python eval/lanes.py [--model demo] [--tokens 32768] [--seq-len 512] [--repeat 3]

Seconds of the evaluation stage of a run with all default lanes, against plain forwards of the same windows through the
whole model in transformers, one per lane, in the same process. The aim is a ratio of at most 1.1.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import evaluation_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    flags = {
        "method": "rtn",
        "eval_data": "builtin",
        "eval_tokens": arguments.tokens,
        "eval_seq_len": arguments.seq_len,
    }
    recipe = llmquant.make_recipe(arguments.model, flags=flags)
    source = open_source(arguments.model)
    windows = evaluation_windows(load_tokenizer(source), "builtin", arguments.tokens, arguments.seq_len)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    ratios = []
    for _ in range(arguments.repeat):
        begin = time.perf_counter()
        with torch.no_grad():
            for batch in windows.batches():
                model(batch, use_cache=False)
        plain = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            report = llmquant.quantize(arguments.model, recipe, Path(folder) / "out")
        evaluate, lanes = report.cost["seconds"]["evaluate"], len(report.lanes)
        ratios.append(evaluate / (lanes * plain))
        print(f"{lanes} lanes {evaluate:.2f} s, one plain forward {plain:.2f} s: ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
