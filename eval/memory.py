"""Peak memory against depth and width: python eval/memory.py [--hidden 512] [--blocks 8 40] [--dtype float32] ...

Builds random Llama checkpoints shard by shard, quantizes each on 32 windows of 512 tokens with four evaluation lanes
and --max-ram 64MB, in a process of its own, and prints its peak RSS and the bound that `llmquant plan` gives:
600 MB + 2 x largest block (compute dtype) + 8 bytes x (largest in_features)^2 + largest embedding or head
+ activations of one batch + --max-ram, and with a compute dtype other than float32 what the pass for the noise floor
needs beyond that.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys
import llmquant
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions
recipe = llmquant.make_recipe("x", flags=json.loads(sys.argv[3]))
report = llmquant.quantize(sys.argv[1], recipe, sys.argv[2], max_ram="64MB")
plan = estimate(sys.argv[1], recipe, RunOptions(sys.argv[2] + "-2", max_ram="64MB"))
print(json.dumps(report.cost | {"bound": sum(plan.memory.values())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 40])
    parser.add_argument("--method", default="gptq", choices=["gptq", "rtn"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vocab", type=int, default=4096)
    arguments = parser.parse_args()
    print(f"{'blocks':>6} {'weights MB':>10} {'peak RSS MB':>11} {'bound MB':>8} {'s':>6}")
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            source = build(Path(folder) / "model", arguments.hidden, blocks, vocab=arguments.vocab)
            cost = quantize(source, Path(folder) / "out", method=arguments.method, dtype=arguments.dtype)
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        peak, bound = cost["peak_rss_bytes"] / 1e6, cost["bound"] / 1e6
        print(f"{blocks:>6} {size / 1e6:>10.0f} {peak:>11.0f} {bound:>8.0f} {cost['total_seconds']:>6.1f}")


def build(
    folder: Path,
    hidden: int,
    blocks: int,
    ffn: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocab: int = 4096,
    context: int = 512,
) -> Path:
    """A random bf16 Llama in `folder`, made shard by shard, on the accelerator where there is one."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    import llmquant

    demo = Path(llmquant.__file__).parent / "demo"
    ffn = ffn or hidden * 11 // 4 // 128 * 128
    heads = heads or hidden // 64
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads // 2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    generator, weight_map = torch.Generator(device).manual_seed(0), {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "outer"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        made = {name: torch.randn(shapes[name], generator=generator, device=device).mul_(0.02) for name in names}
        tensors = {name: tensor.bfloat16().cpu() for name, tensor in made.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantize(source: Path, out: Path, **chosen: str) -> dict[str, float]:
    """The job's cost.json and the plan's bound, from a fresh process."""
    flags = {"samples": 32, "seq_len": 512, "eval_tokens": 8192, "eval_seq_len": 512, **chosen}
    command = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(flags)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cost: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return cost


if __name__ == "__main__":
    main()
