"""README.md of the output: a short model card with measured figures."""

from typing import Any

from llmquant.report import describe_evaluation, lanes_table
from llmquant.summary import command_of, verdict

_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
_LIBRARIES = {"mlx": "mlx", "gguf": "gguf"}
_COMMANDS = {
    "mlx": "pip install mlx-lm && mlx_lm.generate --model . --prompt Hello",
    "gguf": "llama-cli -m model-*.gguf -p Hello",
}
_NEEDS = {"compressed-tensors": "compressed-tensors", "gptq": "optimum gptqmodel", "awq": "gptqmodel"}


def make_card(name: str, base_model: str, report: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML head. All figures come from `report`."""
    recipe = report["recipe"]
    head = [
        f"base_model: {base_model}",
        "base_model_relation: quantized",
        f"library_name: {_LIBRARIES.get(recipe['format'], 'transformers')}",
        "pipeline_tag: text-generation",
    ]
    tags = ["llmquant", f"{recipe['bits']}-bit", recipe["format"]]
    lines = ["---", *head, "tags:", *[f"- {tag}" for tag in tags], "---", "", f"# {name}", ""]
    rows, bits = report["tensors"], report["bits_per_weight"]
    quantized = sum(row["action"] == "quantized" for row in rows)
    lines += [
        f"`{base_model}` with its {quantized} linear layers quantized to {recipe['bits']} bits ({bits:.3f} bits per "
        f"weight with scales) by llmquant {report['versions']['llmquant']}; {len(rows) - quantized} other tensors are "
        "unchanged.",
        "",
    ]
    if forms := report["model"].get("stored_as"):
        stored = " and ".join(forms)
        lines += [f"The original stores weights in {stored}; those that are not quantized are dense here.", ""]
    if packages := _NEEDS.get(recipe["format"]):
        lines += ["```python", _LOAD.format(name=name).rstrip(), "```", "", f"Needs `pip install {packages}`.", ""]
    elif recipe["format"] in _COMMANDS:
        lines += ["```bash", _COMMANDS[recipe["format"]], "```", ""]
    if folders := [f"`{folder}/`" for folder in recipe.get("exports", [])]:
        lines += [f"The same codes and scales in other formats: {', '.join(folders)}.", ""]
    if evaluation := report["evaluation"]:
        lines += [f"**{verdict(report)}**", ""]
        table = lanes_table(evaluation["lanes"])
        lines += [f"Measured on {describe_evaluation(evaluation)}:", "", *_markdown(table), ""]
        lines += ["KL is the divergence from the original per token; ± is one standard error over windows.", ""]
        if "exported_from" in report:
            lines += [f"Measured on the {report['exported_from']} checkpoint whose codes and scales these are.", ""]
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items() if value not in (None, [], ""))
    lines += [
        f"Recipe: {settings}.",
        "",
        "```bash",
        command_of(report),
        "```",
        "",
        "`report.html` shows all of this with plots. Every tensor is listed in `report.json`, every file with its hash "
        "in `manifest.json`.",
        "",
    ]
    return "\n".join(lines)


def _markdown(table: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]
