"""The commands that look and do not write: plan, inspect, doctor."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from llmquant.cli.console import answer, new_console, print_json, print_rows
from llmquant.cli.options import JUDGE, LOOK, MAKE, Debug
from llmquant.cli.progress import duration, size
from llmquant.cli.spellings import FIELDS
from llmquant.recipe import Recipe, RunOptions

if TYPE_CHECKING:
    from rich.console import Console

    from llmquant.preflight.estimate import Estimate

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the tables")]
_BUSY = 1.2  # times as long as on an idle machine: worth a word
# What makes no sense where nothing runs; `json` gets another meaning.
_NOT_IN_PLAN = ("dry_run", "json", "quiet", "resume", "rank_timeout")


def register(app: typer.Typer, run: Callable[..., Any]) -> None:
    """Add the commands to `app`. `plan` takes the options of `run`, whatever those are."""
    app.command(name="plan", rich_help_panel=MAKE, epilog="Example:  llmquant plan --model ./checkpoint --bits 4")(
        _plan_of(run)
    )
    app.command(
        name="inspect",
        rich_help_panel=LOOK,
        epilog="Examples:  llmquant inspect ./demo-W4A16-G128  |  "
        "llmquant inspect ./demo-W4A16-G128 --layer model.layers.0.mlp.up_proj",
    )(inspect_command)
    app.command(rich_help_panel=LOOK, epilog="Example:  llmquant doctor --json")(doctor)
    app.command(
        name="verify",
        rich_help_panel=JUDGE,
        epilog="Example:  llmquant verify ./demo-W4A16-G128 --source demo",
    )(verify_command)


def _plan_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with --dry-run on."""

    def plan(**options: Any) -> None:
        """What `run` with the same options would do and cost. Reads headers and local texts, writes nothing."""
        run(**options, dry_run=True)

    signature = inspect.signature(run, eval_str=True)
    parameters = [p for name, p in signature.parameters.items() if name not in _NOT_IN_PLAN]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    # What typer reads its options from.
    plan.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    plan.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return plan


def options_of(app: typer.Typer) -> dict[str, list[str]]:
    """The option names of every command."""
    group: Any = typer.main.get_command(app)
    return {
        name: [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        for name, command in group.commands.items()
    }


def names_of_fields(app: typer.Typer) -> dict[str, dict[str, str]]:
    """How every command spells its options, by the field that an error names: {"eval": {"eval_data": "--data"}}."""
    group: Any = typer.main.get_command(app)
    table: dict[str, dict[str, str]] = {}
    for command, options in options_of(app).items():
        names = {option.lstrip("-").replace("-", "_"): option for option in options if option.startswith("--")}
        parameters = {p.name: p.opts[0] for p in group.commands[command].params if p.opts[0].startswith("--")}
        names |= parameters
        table[command] = names | {field: parameters[name] for field, name in FIELDS.get(command, {}).items()}
    return table


def show_plan(model: str, recipe: Recipe, options: RunOptions, *, as_json: bool, timed: bool) -> None:
    """Print the estimate; exit with the code of the first problem that would end the run."""
    from llmquant.preflight.estimate import estimate

    found = estimate(model, recipe, options, timed=timed)
    if as_json:
        print_json(found.as_dict())
    else:
        _print_plan(found)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _print_plan(found: "Estimate") -> None:
    console = new_console()
    if found.kinds:
        rows = [["tensors", "", "shape", "dtype", "what", "why"]]
        for kind in found.kinds:
            what = (
                {"copied": "copy"}.get(kind.action, kind.action)
                if kind.bits is None
                else f"{kind.bits} bits, {_group(kind.group_size)}"
            )
            rows.append([kind.name, f"{kind.count} x", _shape(kind.shape), kind.dtype, what, kind.reason])
        print_rows(console, rows, bold=lambda row: row[4] not in ("copy", "left out"))
        console.print()
    summary = [["model", found.model + (f" @ {found.revision[:12]}" if found.revision else "")]]
    if found.stored_as:
        forms = ", ".join(f"{count} tensors in {form}" for form, count in found.stored_as.items())
        summary += [["stored as", f"{forms}; dequantized one by one as they are read"]]
    if found.bits_per_weight is not None:
        summary += [
            ["compute", f"{found.compute['dtype']} on {found.compute['device']}"],
            ["size", f"{size(found.source_bytes)} -> {size(found.output_bytes)}"],
            ["bits per weight", f"{found.bits_per_weight:.3f} in the quantized linears, scales included"],
            ["opens in", ", ".join(name for name, yes in found.opens.items() if yes) or "none of the known runtimes"],
            ["peak memory", _sum_of(found.memory, size, "at most ")],
            *([["on the device", _sum_of(found.device_memory, size, "at most ")]] if found.device_memory else []),
            ["disk", _sum_of(found.disk, size)],
            *(
                [
                    [
                        "ranks",
                        f"{found.ranks}; each sends {size(found.sent_bytes)}, up to {size(found.sent_bytes_of_block)} "
                        "for a block",
                    ]
                ]
                if found.ranks > 1
                else []
            ),
            ["time", _sum_of(found.seconds, duration, "about ")],
        ]
        if found.busy > _BUSY:
            now = duration(found.busy * sum(found.seconds.values()))
            summary += [["", f"{now} while this machine is as busy as it is now"]]
    for name, text in summary:
        console.print(f"[bold]{name:16}[/]", end="")
        console.print(text, markup=False, soft_wrap=True)
    for line in found.assumptions:
        console.print(f"({line})", style="dim", markup=False, soft_wrap=True)
    for problem in found.problems:
        style, word = ("bold red", "problem") if problem.blocking else ("yellow", "note")
        console.print(f"{word}: {problem.message}", style=style, markup=False, soft_wrap=True)
    if not found.problems:
        console.print("no problems found")


def inspect_command(
    model: Annotated[str, typer.Argument(help="demo, a folder, a GGUF file, or a Hub id: 16 bit or quantized")],
    layer: Annotated[Optional[str], typer.Option(help="Statistics of this tensor or module")] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a checkpoint is: schemes, sizes and bits by kind of tensor."""
    from llmquant.preflight.inspection import inspect_checkpoint, inspect_layer

    found = inspect_layer(model, layer, revision) if layer else inspect_checkpoint(model, revision)
    if json:
        return print_json(found)
    console = new_console()
    if layer:
        return _print_layer(console, found)
    rows = [["tensors", "", "shape", "scheme", "stored as", "size", "bits/weight"]]
    for kind in found["kinds"]:
        sizes = (size(kind["bytes"]), f"{kind['bits_per_weight']:.3f}")
        rows.append(
            [
                kind["name"],
                f"{kind['count']} x",
                _shape(kind["shape"]),
                kind["form"] or _scheme(kind["scheme"]),
                kind["stored"],
                *sizes,
            ]
        )
    print_rows(console, rows, bold=lambda row: row[3] != "-")
    what = "in the quantized linears, scales included" if found["quantized"] else "over all tensors"
    files = f"{found['files']} file{'s' if found['files'] > 1 else ''}"
    text = (
        f"{found['model']}: {found['model_type']}, {found['weights'] / 1e6:.1f} M weights, {size(found['bytes'])} in "
        f"{files}, {found['bits_per_weight']:.3f} bits per weight {what}"
    )
    console.print(text, markup=False, soft_wrap=True)


def _print_layer(console: "Console", found: dict[str, Any]) -> None:
    console.print(
        f"{found['name']}  {_shape(found['shape'])}  {found['form'] or _scheme(found['scheme'])}",
        markup=False,
        style="bold",
    )
    parts = [[p["name"], p["dtype"], _shape(p["shape"]), size(p["bytes"])] for p in found["stored"]]
    print_rows(console, [["stored as", "dtype", "shape", "size"], *parts])
    spreads = {name: found[name] for name in ("values", "scales") if name in found}
    figures = list(dict.fromkeys(key for spread in spreads.values() for key in spread))
    body = [[name, *(f"{s[key]:.6g}" if key in s else "" for key in figures)] for name, s in spreads.items()]
    print_rows(console, [["", *figures], *body])
    if codes := found.get("codes"):
        most = max(codes["histogram"].values())
        if len(codes["histogram"]) <= 32:
            for code, count in codes["histogram"].items():
                console.print(f"{code:>5} {count:>12} {'#' * round(50 * count / most)}", markup=False)
        console.print(
            f"codes: entropy {codes['entropy_bits']:.3f} bits, {codes['at_ends']:.2%} at the ends of the range, "
            f"{codes['zero']:.2%} zero"
        )


def verify_command(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that llmquant wrote")],
    source: Annotated[
        Optional[str], typer.Option(help="Compare with the original too: demo, a local folder, or a Hub id")
    ] = None,
    debug: Debug = False,
) -> None:
    """Re-read a finished folder: every file, code, scale and copied tensor is what the run computed."""
    from llmquant.output.check import verify_folder

    found = verify_folder(checkpoint, source)
    beside = "" if found.against is None else f", compared with {found.against}"
    exports = f", and so are its exports ({', '.join(found.exports)})" if found.exports else ""
    tensors = f"{found.quantized} quantized and {found.copied} copied tensors"
    answer(f"{checkpoint}: {found.files} files, {tensors} are right{exports}{beside}")
    for reason, count in found.not_compared.items():
        answer(f"{count} not compared: {reason}")
    if found.card_changed:
        answer("README.md is not as the run wrote it")
    if found.added:
        answer(f"added later, and read by no loader: {', '.join(found.added)}")


def doctor(json: Json = False) -> None:
    """What this installation and machine can do: versions, devices, disk, Hub, formats."""
    from llmquant.preflight.doctor import diagnose

    found = diagnose()
    if json:
        return print_json(found)
    console, machine, hub = new_console(), found["machine"], found["hub"]
    versions = ", ".join(f"{name} {v or 'missing'}" for name, v in found["versions"].items())
    token = f"token {'set' if hub['token'] else 'not set'}"
    memory = "" if machine["memory_bytes"] is None else f", {size(machine['memory_bytes'])} memory"
    rows = [
        ["python", found["python"]],
        ["packages", versions],
        ["machine", f"{machine['system']}, {machine['cores']} cores, {machine['instruction_set']}{memory}"],
        ["devices", ", ".join(f"{d['name']} ({d['what']})" for d in found["devices"])],
        ["disk", f"{size(found['disk']['free_bytes'])} free in {found['disk']['folder']}"],
        ["Hub", f"{hub['endpoint']}, {_reached(hub)}, {token}, cache {hub['cache']}"],
        [
            "formats",
            ", ".join(
                f"{n} ({'opens' if f['installed'] else 'cannot be opened'} here)" for n, f in found["formats"].items()
            ),
        ],
    ]
    for name, text in rows:
        console.print(f"[bold]{name:10}[/]", end="")
        console.print(text, markup=False, soft_wrap=True)
    for problem in found["problems"]:
        console.print(f"note: {problem}", style="yellow", markup=False, soft_wrap=True)


def _reached(hub: dict[str, Any]) -> str:
    if hub["offline"]:
        return "offline by HF_HUB_OFFLINE"
    failure, seconds = hub["not_reached"], hub["answered_seconds"]
    return f"online, {seconds:.1f} s" if failure is None else f"not reached: {failure}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _scheme(scheme: dict[str, Any] | None) -> str:
    if scheme is None:
        return "-"
    return f"{scheme['bits']} bits, {_group(scheme['group_size'])}" + ("" if scheme["symmetric"] else ", asymmetric")


def _group(group_size: int | None) -> str:
    return "by row" if group_size == -1 else f"groups of {group_size}"


def _sum_of(parts: dict[str, Any], text: Callable[[float], str], prefix: str = "") -> str:
    shown = ", ".join(f"{name} {text(value)}" for name, value in parts.items() if value)
    return f"{prefix}{text(sum(parts.values()))} ({shown})"
