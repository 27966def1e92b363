"""Perplexity of checkpoints, one line each: python eval/perplexity.py MODEL... [--data wikitext2] [--tokens full]

16-bit and compressed-tensors checkpoints, streamed block by block. GPTQ-style protocol.
"""

import argparse

import llmquant
from llmquant.report.tables import describe_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--tokens", default="65536", help="a number, or full")
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    flags = {
        "eval_data": arguments.data,
        "eval_tokens": int(arguments.tokens) if arguments.tokens.isdecimal() else arguments.tokens,
        "eval_seq_len": arguments.seq_len,
    }
    for model in arguments.models:
        evaluation = llmquant.evaluate(model, recipe=llmquant.make_recipe(model, flags=flags)).facts.evaluation
        (lane,) = evaluation.lanes.values()
        error = "" if lane.perplexity_se is None else f" ± {lane.perplexity_se:.3f}"
        print(f"{model}: {lane.perplexity:.3f}{error} ({describe_evaluation(evaluation)})")


if __name__ == "__main__":
    main()
