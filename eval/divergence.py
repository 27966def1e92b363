"""Where a quantized model differs: python eval/divergence.py MODEL --reference ORIGINAL [--data wikitext2]

KL(original || model) by position in the window, and by how sure the original was of its top token.
"""

import argparse

import numpy as np

import llmquant
from llmquant.comparison import score_tokens

POSITIONS = (1, 4, 16, 64, 256, 1024, 4096)
CONFIDENCES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    flags = {"eval_data": arguments.data, "eval_tokens": arguments.tokens, "eval_seq_len": arguments.seq_len}
    recipe = llmquant.make_recipe(arguments.reference, flags=flags)
    windows, _, scores = score_tokens([arguments.model], arguments.reference, recipe)
    original, model = scores.values()
    position = np.broadcast_to(np.arange(1, windows.ids.shape[1]), model.kl.shape)
    print(f"{arguments.model} against {arguments.reference}: {windows.dataset}, {windows.n_tokens} tokens")
    table("position", position, POSITIONS, model.kl, model.finite)
    table("original's top probability", original.confidence, CONFIDENCES, model.kl, model.finite)


def table(name: str, values: np.ndarray, edges: tuple[float, ...], kl: np.ndarray, finite: np.ndarray) -> None:
    """Mean KL, its standard error over windows, and the number of tokens, for `values` in each [edge, next edge)."""
    print(f"\n{name:>28} {'tokens':>8} {'KL':>9} {'se':>9}")
    for low, high in zip(edges, (*edges[1:], np.inf), strict=True):
        chosen = (values >= low) & (values < high) & finite
        means = np.array([row[mask].mean() for row, mask in zip(kl, chosen, strict=True) if mask.any()])
        if len(means):
            error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
            print(f"{f'{low:g} to {high:g}':>28} {chosen.sum():>8} {kl[chosen].mean():>9.5f} {error:>9.5f}")


if __name__ == "__main__":
    main()
