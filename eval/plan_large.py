"""What `plan` says of a checkpoint of DeepSeek-V3's shape: 671 billion weights in FP8 blocks, 90,427 tensors over 160
shards. The files are sparse: headers, and holes in the place of the weights.

    python eval/plan_large.py FOLDER        # an empty folder, on a file system that knows holes; 12 MB are written

Prints the time and the peak memory of planning, and the bound for a run.
"""

import json
import math
import resource
import shutil
import sys
import time
from pathlib import Path

from transformers import DeepseekV3Config

from llmquant.demo import DEMO
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe

N_SHARDS, BLOCK = 160, 128
WIDTH = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Tensors = list[tuple[str, str, tuple[int, ...]]]


def tensors(config: DeepseekV3Config) -> Tensors:
    """(name, dtype, shape) of all of them, as the upload has them."""
    hidden, heads, inner = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    found: Tensors = []

    def linear(name: str, rows: int, columns: int) -> None:
        found.append((f"{name}.weight", "F8_E4M3", (rows, columns)))
        found.append((f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))))

    def other(name: str, *shape: int) -> None:
        found.append((name, "BF16", shape))

    def mlp(name: str, width: int) -> None:
        linear(f"{name}.gate_proj", width, hidden)
        linear(f"{name}.up_proj", width, hidden)
        linear(f"{name}.down_proj", hidden, width)

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        other(name, config.vocab_size, hidden)
    other("model.norm.weight", hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        other(f"{layer}.input_layernorm.weight", hidden)
        other(f"{layer}.post_attention_layernorm.weight", hidden)
        other(f"{attention}.q_a_layernorm.weight", config.q_lora_rank)
        other(f"{attention}.kv_a_layernorm.weight", config.kv_lora_rank)
        linear(f"{attention}.q_a_proj", config.q_lora_rank, hidden)
        linear(f"{attention}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
        linear(f"{attention}.kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        linear(f"{attention}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        linear(f"{attention}.o_proj", hidden, heads * config.v_head_dim)
        if index < config.first_k_dense_replace:
            mlp(f"{layer}.mlp", config.intermediate_size)
            continue
        other(f"{layer}.mlp.gate.weight", config.n_routed_experts, hidden)
        found.append((f"{layer}.mlp.gate.e_score_correction_bias", "F32", (config.n_routed_experts,)))
        for name in ("shared_experts", *(f"experts.{expert}" for expert in range(config.n_routed_experts))):
            mlp(f"{layer}.mlp.{name}", inner)
    return found


def write(folder: Path) -> None:
    config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(str(DEMO)) / name, folder)
    found = tensors(config)
    per_shard, weight_map = math.ceil(len(found) / N_SHARDS), {}
    for number in range(N_SHARDS):
        file = f"model-{number + 1:05}-of-{N_SHARDS:05}.safetensors"
        header, end = {}, 0
        for name, dtype, shape in found[number * per_shard : (number + 1) * per_shard]:
            begin, end = end, end + math.prod(shape) * WIDTH[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    folder = Path(sys.argv[1])
    if not (folder / "config.json").exists():
        write(folder)
    begin = time.perf_counter()
    recipe = make_recipe(str(folder), flags={"eval_data": "none"})
    found = estimate(folder, recipe, RunOptions(folder / "out"))
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"planned in {seconds:.1f} s with {peak:.2f} GB at the peak")
    print(f"a run takes at most {sum(found.memory.values()) / 1e9:.1f} GB: " + json.dumps(found.memory))
    for problem in found.problems:
        print(problem.message)


if __name__ == "__main__":
    main()
