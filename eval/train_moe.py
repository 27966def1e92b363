"""A small mixture of experts that has learnt something, for figures of quantized experts:

    python eval/train_moe.py OUT --text FILE [FILE ...] [--minutes 75 | --steps 1100]

Random experts all look alike to a quantizer. This trains a Qwen3-MoE of 21M parameters (6 blocks of width 256, 8
experts of 512, 2 for each token) with the demo's tokenizer on text files, with AdamW and a cosine, one step for 8
windows of 256 tokens, and writes it in bfloat16. It says little that makes sense, but its experts differ, and some are
seldom chosen. --minutes takes what the machine has time for; --steps can be repeated.

Prints the mean loss (an average that forgets after about 50 steps) every 50 steps.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmquant.demo import DEMO

WINDOWS, LENGTH = 8, 256  # of a step
PEAK, FLOOR, WARMUP = 2e-3, 0.05, 50  # learning rate, the share of it at the end, steps until it is reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = torch.cat([tokenizer(path.read_text("utf-8"), return_tensors="pt").input_ids[0] for path in arguments.text])
    model = Qwen3MoeForCausalLM(config(len(tokenizer)))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(ids)} tokens", flush=True)

    begin = time.monotonic()

    def done(step: int) -> float:
        if arguments.steps is not None:
            return step / arguments.steps
        return (time.monotonic() - begin) / (60 * arguments.minutes)

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    step, mean = 0, 0.0
    while (share := done(step)) < 1:
        rate = PEAK * min(1.0, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (WINDOWS,))
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}, {share:.0%} done, loss {mean:.3f}", flush=True)

    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def config(vocab_size: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.005,
        output_router_logits=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


if __name__ == "__main__":
    main()
