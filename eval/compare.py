"""Several checkpoints in one Markdown table: python eval/compare.py A B ... --reference ORIGINAL [--data wikitext2]

The same as `llmquant compare`, as a starting point for scripts of your own.
"""

import argparse

import llmquant
from llmquant.report.tables import describe_evaluation, differences_table, lanes_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    flags = {"eval_data": arguments.data, "eval_tokens": arguments.tokens, "eval_seq_len": arguments.seq_len}
    recipe = llmquant.make_recipe(arguments.reference, flags=flags)
    facts = llmquant.compare(arguments.models, reference=arguments.reference, recipe=recipe).facts
    for rows in (lanes_table(facts.evaluation.lanes), differences_table(facts.differences)):
        if len(rows) > 1:
            print(
                "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])) + "\n"
            )
    print(describe_evaluation(facts.evaluation))


if __name__ == "__main__":
    main()
