"""What serving costs: python eval/inference.py --original ORIGINAL --quantized DIR [--prompt 512] [--new 32]

Load time, peak memory, prefill and decode speed of the original in its own dtype, of our checkpoint in stock
transformers, and of bitsandbytes NF4 made on the fly, each in a process of its own; median of --repeat runs.
transformers unpacks compressed-tensors to dense weights on the first forward, so ours is no faster than the original
there; kernels for packed weights are the business of vLLM and SGLang. Slower results are shown too.
"""

import argparse
import json
import subprocess
import sys

CHILD = """
import json, resource, statistics, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
path, kind, prompt, new, repeat = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
device = "cuda" if torch.cuda.is_available() else "cpu"
options = {"dtype": "auto", "device_map": device}
if kind == "bitsandbytes NF4":
    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
with torch.no_grad():
    model(ids[:, :8])  # the first forward unpacks
    load = time.perf_counter() - begin
    prefill, decode = [], []
    for _ in range(repeat):
        begin = time.perf_counter()
        out = model(ids, use_cache=True)
        prefill.append(prompt / (time.perf_counter() - begin))
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(new / (time.perf_counter() - begin))
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if device == "cuda":
    peak = torch.cuda.max_memory_allocated()
print(json.dumps([load, peak, statistics.median(prefill), statistics.median(decode)]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, help="local folder or Hub id")
    parser.add_argument("--quantized", required=True, help="folder that llmquant wrote")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [str(arguments.prompt), str(arguments.new), str(arguments.repeat)]
    print(f"prompt of {arguments.prompt} tokens, {arguments.new} new ones, median of {arguments.repeat}")
    print(f"{'':>20} {'load s':>8} {'peak MB':>8} {'prefill tok/s':>14} {'decode tok/s':>13}")
    for kind in ("original", "llmquant", "bitsandbytes NF4"):
        path = arguments.quantized if kind == "llmquant" else arguments.original
        command = [sys.executable, "-c", CHILD, path, kind, *sizes]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        load, peak, prefill, decode = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind:>20} {load:>8.2f} {peak / 1e6:>8.0f} {prefill:>14.0f} {decode:>13.1f}")


if __name__ == "__main__":
    main()
