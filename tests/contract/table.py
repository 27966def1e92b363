"""The outcomes that are known (outcomes.json, a line for each name), and docs/models.md, which is made of them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from contract.kinds import KINDS

FILE = Path(__file__).with_name("outcomes.json")
DOCS = Path(__file__).parents[2] / "docs" / "models.md"

Row = Mapping[str, Any]  # kind, result, and cause or figures
HEADINGS = {
    "dense": "Dense",
    "MoE": "Mixtures of experts",
    "hybrid": "State spaces and other hybrids",
    "hybrid MoE": "Hybrids with experts",
    "multimodal": "Multimodal: the text is quantized, towers are kept",
    "odd": "Odd ones: bytes, drafts, diffusion, two streams",
    "encoder": "Encoders, encoder-decoders and their halves, decoders of speech and music",
    "unknown": "Not built",
}
# Words for a cause in the summary, by its message. What fits none is called by the class of its error.
CAUSES = (
    ("does not run it as a layer", "weights that are used without their layer"),
    ("merged with others", "experts or other tensors that transformers merges"),
    ("all experts in one tensor", "experts in one tensor"),
    ("cannot hold Conv1D", "Conv1D layers"),
    ("cannot be streamed block by block|runs it more than once", "blocks that do not run once each, in their order"),
    ("cannot be run on text alone", "models that want more than text"),
    ("experts of an unknown form|experts in \\d+ kinds|expected \\d+ experts", "experts of another form"),
    ("is an encoder-decoder", "encoder-decoders"),
    ("no weights for", "weights under other names"),
    ("compressed-tensors in transformers", "rules of transformers that fail on packed weights"),
    ("not divisible", "widths that no group divides"),
    ("cannot open|would not open", "transformers cannot open the result"),
    ("no causal LM", "no causal LM"),
    ("no list of decoder blocks", "no list of blocks"),
    ("transformers cannot build", "a config that transformers cannot read back"),
)


def load() -> tuple[str, dict[str, Row]]:
    """The version of transformers that was measured, and a row for each name; ("", {}) where there is no table."""
    if not FILE.exists():
        return "", {}
    stored = json.loads(FILE.read_text("utf-8"))
    return stored["transformers"], stored["types"]


def save(version: str, rows: Mapping[str, Row]) -> None:
    """One line for each name, so that a change is a line of the diff. Only what every machine agrees on."""
    lines = [f"{json.dumps(name)}: {json.dumps(_kept(rows[name]))}" for name in sorted(rows)]
    body = ",\n".join(lines)
    FILE.write_text(f'{{"transformers": {json.dumps(version)},\n"types": {{\n{body}\n}}}}\n', "utf-8")


def _kept(row: Row) -> dict[str, Any]:
    kept = {key: row[key] for key in ("kind", "result", "cause") if key in row}
    share = row.get("share", row.get("figures", {}).get("share"))
    return kept | ({"share": round(share, 2)} if share is not None else {})


def docs(version: str, rows: Mapping[str, Row]) -> str:
    """docs/models.md."""
    plain = {name: row for name, row in rows.items() if not re.search("[:+]", name)}
    parts = [
        "# Model types",
        summary(version, rows),
        f"""Every type of transformers {version} that generates text, as a tiny random checkpoint, was quantized to
4 bits in groups of 32. *Passes* means: `verify` agrees; the class in `architectures` opens the output with no key
missing; its logits are those of an independently dequantized copy; perplexity and KL in the report are those of stock
transformers; routers and towers are untouched; and most of the blocks' parameters are quantized. *Elsewhere* means that
all that holds but the opening: transformers has no rule for single experts of the type and would leave them random, so
the run is refused unless other runtimes are named (`--for vllm`). *Refused* means one line before any work. *Not built*
means that transformers builds or runs no tiny model of the type on text.
`python eval/model_types.py --write` measures all of it anew and writes this page; `tests/contract/` is the check.""",
        _table(
            ["kind", "types", "pass", "elsewhere", "refused", "not built"],
            [[HEADINGS[kind], *_counts(_of(plain, kind))] for kind in HEADINGS if _of(plain, kind)],
        ),
    ]
    for kind in HEADINGS:
        if own := _of(plain, kind):
            parts += [f"## {HEADINGS[kind]}", *_listed(own)]
    for mark, heading in ((":", "Variants of types"), ("+", "Checkpoints with something beside the model")):
        if own := {name: row for name, row in rows.items() if mark in name}:
            parts += [f"## {heading}", *_listed(own)]
    return "\n\n".join(parts) + "\n"


def summary(version: str, rows: Mapping[str, Row]) -> str:
    """One paragraph, for README, too. Encoders and their like do not count."""
    plain = {name: row for name, row in rows.items() if not re.search("[:+]", name)}
    counted = {name: row for name, row in plain.items() if row["kind"] in KINDS[:-1]}
    others = {name: row for name, row in plain.items() if row["kind"] == "encoder"}
    results = Counter(row["result"] for row in counted.values())
    causes = Counter(short(row["cause"]) for row in counted.values() if row["result"] == "refused")
    text = f"{results['passes']} of {len(counted)} types of transformers {version} that generate text pass"
    if results["elsewhere"]:
        text += (
            f"; {results['elsewhere']} more for other runtimes (`--for vllm`), as transformers has no rule for single"
        )
        text += " experts of theirs"
    if causes:
        text += f"; {results['refused']} are refused: " + ", ".join(f"{n} for {why}" for why, n in causes.most_common())
    if results["not built"]:
        text += f"; of {results['not built']} transformers builds no small model"
    if bugs := results["crash"] + results["wrong"]:
        text += f"; {bugs} are bugs"
    encoders = Counter(row["result"] for row in others.values())
    return f"""<!-- summary -->
{text}. Not counted: {len(others)} encoders, halves of encoder-decoders and decoders of speech or music, of which \
{encoders["passes"]} pass.
<!-- end -->"""


def short(cause: str) -> str:
    """
    >>> short("FormatError: h.N.attn: compressed-tensors cannot hold Conv1D layers; expected nn.Linear")
    'Conv1D layers'
    >>> short("SourceError: config.json: nothing known")
    'SourceError'
    """
    return next((words for pattern, words in CAUSES if re.search(pattern, cause)), cause.partition(":")[0])


def _of(rows: Mapping[str, Row], kind: str) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if row["kind"] == kind}


def _counts(rows: Mapping[str, Row]) -> list[str]:
    results = Counter(row["result"] for row in rows.values())
    return [str(n) for n in (len(rows), *(results[one] for one in ("passes", "elsewhere", "refused", "not built")))]


def _listed(rows: Mapping[str, Row]) -> list[str]:
    """Those that pass in one line, the others with their cause."""
    passing = [name for name in sorted(rows) if rows[name]["result"] == "passes"]
    other = [[f"`{name}`", rows[name]["result"], _cause(rows[name])] for name in sorted(rows.keys() - {*passing})]
    parts = ["Pass: " + ", ".join(f"`{name}`" for name in passing) + "."] if passing else []
    return parts + ([_table(["type", "", "cause"], other)] if other else [])


def _cause(row: Row) -> str:
    """The line of a refusal; without its remedies where the type passes elsewhere."""
    cause = str(row.get("cause", ""))
    return cause.partition(";")[0] if row["result"] == "elsewhere" else cause


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
