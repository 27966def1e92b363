"""README.md of the output: a model card with the Hub's YAML head, from report.json and model_cards/TEMPLATE.md.

The same report gives the same card: figures are those that the run measured.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.formats.facts import FACTS
from llmquant.report.command import command_of
from llmquant.report.data import Evaluation, RunReport, TextWindows
from llmquant.report.plain import plain
from llmquant.report.tables import describe_evaluation, lanes_table
from llmquant.report.verdict import health, said_of_choices, verdict

if TYPE_CHECKING:
    from jinja2 import Template

_NAMES = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test", "c4": "allenai/c4:en:validation"}
_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
_TRANSFORMERS = """# pip install transformers{packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{more})
model = AutoModelForCausalLM.from_pretrained("{name}"{more})
inputs = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""


def make_card(name: str, report: RunReport, base_model: str | None = None) -> str:
    """Markdown with the Hub's YAML head. All figures come from `report`.

    name         what the snippets load: the folder's name, or the repository's
    base_model   the original on the Hub, where the report knows only a folder
    """
    evaluation, rows, recipe = report.evaluation, report.tensors, report.recipe
    n_quantized = sum(row.action == "quantized" for row in rows)
    folders = [f"`{format_name}/`" for format_name in recipe.get("exports", [])]
    text = _template().render(
        metadata=_metadata(name, report, base_model),
        name=_plain(name),
        base=f"`{_plain(base_model or report.model.id)}`",
        report=report,
        recipe=recipe,
        bits=" and ".join(map(str, _widths(report))),
        title=FACTS[recipe["format"]].title,
        n_quantized=n_quantized,
        n_copied=len(rows) - n_quantized,
        verdict=verdict(report),
        uses=_uses(_plain(name), report),
        elsewhere=", ".join(folders),
        refused=_refused(report),
        protocol=describe_evaluation(evaluation) if evaluation else "",
        table=_markdown(lanes_table(evaluation.lanes)) if evaluation else "",
        health=[_plain(note) for note in health(report)],
        code=", ".join(f"`{_plain(file)}`" for file in report.model.remote_code),
        licensed=report.model.card.license is not None,
        command=_plain(command_of(report)),
        settings=", ".join(_setting(key, value) for key, value in recipe.items() if value not in (None, [], "")),
        chosen=[_plain(said) for said in said_of_choices(report)],
        calibration=_calibration(report.calibration),
        packages=", ".join(f"{package} {version}" for package, version in report.versions.items()),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template_folder()),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("TEMPLATE.md")


def template_folder() -> Path:
    """model_cards/: package data when installed, the top-level folder in a checkout."""
    installed = Path(__file__).parents[1] / "model_cards"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "model_cards"


def _widths(report: RunReport) -> list[int]:
    """The widths of the codes, which rules may mix."""
    return sorted({row.bits for row in report.tensors if row.bits is not None})


def _metadata(name: str, report: RunReport, base_model: str | None) -> str:
    """The YAML head. A folder's name is no base_model: on the Hub it would point at somebody else's model."""
    from huggingface_hub import ModelCardData

    model, recipe = report.model, report.recipe
    card: dict[str, Any] = plain(model.card)
    base_model = base_model or (model.id if model.revision or "/" in model.id else None)
    if base_model:
        card["base_model_relation"] = "quantized"
    data = ModelCardData(
        base_model=base_model,
        model_name=name,
        library_name=FACTS[recipe["format"]].library,
        pipeline_tag=card.pop("pipeline_tag", "text-generation"),
        tags=["llmquant", *(f"{bits}-bit" for bits in _widths(report)), recipe["format"], *recipe.get("exports", [])],
        datasets=_datasets(card.pop("datasets", []), report.calibration),
        eval_results=_results(report.evaluation),
        **card,
    )
    order = ["base_model", "base_model_relation", "license", "license_name", "license_link"]
    return data.to_yaml(original_order=order).rstrip()


def _datasets(training: str | list[str], calibration: TextWindows | None) -> list[str] | None:
    """Training data of the original, then calibration text, where that has a revision on the Hub."""
    names = [training] if isinstance(training, str) else list(training)
    if calibration is not None and calibration.revision:
        names.append(_NAMES.get(calibration.dataset, calibration.dataset).partition(":")[0])
    return list(dict.fromkeys(names)) or None


def _results(evaluation: Evaluation | None) -> Any:
    """The model-index: our lane's figures on the evaluation text. An infinite perplexity has no place in it."""
    from huggingface_hub import EvalResult

    if evaluation is None:
        return None
    lane, dataset = evaluation.ours, evaluation.dataset
    repo, config, split = [*_NAMES.get(dataset, dataset).split(":"), "", ""][:3]
    figures = {
        "perplexity": ("Perplexity", lane.perplexity),
        "kl_divergence": ("KL divergence from the original, nats per token", lane.kl_mean),
        "same_top_token": ("Share of tokens with the original's most likely token", lane.same_top),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=repo,
            dataset_name=dataset,
            dataset_config=config or None,
            dataset_split=split or None,
            dataset_revision=evaluation.revision,
            dataset_args={"n_tokens": evaluation.n_tokens, "seq_len": evaluation.seq_len},
            metric_type=kind,
            metric_name=title,
            metric_value=float(f"{value:.6g}"),
        )
        for kind, (title, value) in figures.items()
        if math.isfinite(value)
    ]


def _uses(name: str, report: RunReport) -> list[dict[str, str]]:
    """How to load it, for every runtime that the lint passes and whose command we know, the main format first."""
    main, shown = report.recipe["format"], dict[str, dict[str, str]]()
    for format_name, runtimes in report.runtimes.items():
        for runtime, facts in runtimes.items():
            code = _snippet(runtime, format_name, name, report) if facts.opens else None
            if code is None or runtime in shown or (format_name != main and not FACTS[format_name].one_file):
                continue
            shown[runtime] = {
                "title": _TITLES.get(runtime, runtime),
                "notes": "; ".join([facts.version, *facts.notes]),
                "language": "python" if runtime == "transformers" else "bash",
                "code": code,
            }
    return list(shown.values())


def _snippet(runtime: str, format_name: str, name: str, report: RunReport) -> str | None:
    """`name` with a slash is a repository, without one a folder."""
    gguf = next((file for file in report.files if file.endswith(".gguf")), "")
    code = bool(report.model.remote_code)
    facts = FACTS[format_name]
    if runtime == "transformers":
        more = f', gguf_file="{gguf}"' if facts.one_file else ", trust_remote_code=True" if code else ""
        packages = "".join(f" {package}" for package in facts.packages)
        return _TRANSFORMERS.format(name=name, more=more, packages=packages)
    if runtime == "llama.cpp":
        kind = gguf.removesuffix(".gguf").rpartition("-")[2]
        where = f"-hf {name}:{kind}" if "/" in name else f"-m {name}/{gguf}"
        return f'llama-cli {where} -p "The history of"'
    if facts.one_file:
        return None  # needs a local file and a foreign tokenizer
    flag = " --trust-remote-code" if code else ""
    return {
        "vllm": f"vllm serve {name}{flag}",
        "sglang": f"python -m sglang.launch_server --model-path {name}{flag}",
        "mlx-lm": f'mlx_lm.generate --model {name} --prompt "The history of"',
    }.get(runtime)


def _refused(report: RunReport) -> str:
    """Runtimes that open none of its formats, with the lint's reason and remedy in the main one."""
    formats = list(report.runtimes.values())
    opened = {runtime for runtimes in formats for runtime, facts in runtimes.items() if facts.opens}
    return ", ".join(
        f"{_TITLES.get(runtime, runtime)} {facts.version} ({'; '.join(facts.notes)})"
        for runtime, facts in (formats[0] if formats else {}).items()
        if runtime not in opened
    )


def _setting(key: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return f"{key} {' '.join(_plain(str(item)) for item in values)}"


def _calibration(calibration: TextWindows | None) -> str:
    if calibration is None:
        return "No calibration text."
    revision = f"@{calibration.revision[:8]}" if calibration.revision else ""
    return (
        f"Calibration text: {_plain(calibration.dataset)}{revision}, {calibration.n_tokens} tokens, SHA-256 of "
        f"the ids `{calibration.ids_sha256}`."
    )


def _plain(text: str) -> str:
    """Strangers' strings in Markdown: nothing that ends a line, a code span or starts a tag."""
    return "".join(char if char.isprintable() and char not in "`<>" else "?" for char in text)


def _markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
