"""How options are spelled: as people know them from other tools, and as errors name them for each command."""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence

from llmquant.errors import flag

# Names known from other quantizers -> ours; the first that the command has is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    "--model-id": ("--model",),
    "--model-path": ("--model",),
    "--model-name-or-path": ("--model",),
    "--pretrained": ("--model",),
    "--output": ("--out",),
    "--output-dir": ("--out",),
    "--output-path": ("--out",),
    "--save-dir": ("--out",),
    "--save-path": ("--out",),
    "--wbits": ("--bits",),
    "--w-bit": ("--bits",),
    "--num-bits": ("--bits",),
    "--groupsize": ("--group-size",),
    "--q-group-size": ("--group-size",),
    "--asym": ("--asymmetric",),
    "--dataset": ("--calibration", "--data"),
    "--calib-data": ("--calibration",),
    "--calibration-dataset": ("--calibration",),
    "--nsamples": ("--samples",),
    "--n-samples": ("--samples",),
    "--num-samples": ("--samples",),
    "--num-calibration-samples": ("--samples",),
    "--seqlen": ("--seq-len",),
    "--max-seq-len": ("--seq-len",),
    "--max-seq-length": ("--seq-len",),
    "--sequence-length": ("--seq-len",),
    "--percdamp": ("--damp",),
    "--damp-percent": ("--damp",),
    "--dampening-frac": ("--damp",),
    "--ignore-layers": ("--ignore",),
    "--torch-dtype": ("--dtype",),
    "--quant-method": ("--method",),
    "--upload-repo": ("--push-to-hub", "--repo"),
    "--repo-id": ("--repo", "--push-to-hub"),
    "--algorithm": ("--method",),
}
COMMANDS = {"quantize": "run", "quant": "run", "evaluate": "eval", "perplexity": "eval", "info": "inspect"}

_RUN = {"symmetric": "asymmetric", "rules": "rule", "exports": "format", "repo": "push_to_hub"}
_EVALUATION = {"eval_data": "data", "eval_tokens": "tokens", "eval_seq_len": "seq_len"}
# Command -> field of the recipe or the API -> the command's parameter for it, where that has another name.
FIELDS = {"eval": _EVALUATION, "compare": _EVALUATION, "run": _RUN, "plan": _RUN}


def naming(command: str, names: Mapping[str, Mapping[str, str]]) -> Callable[[str], str]:
    """What to call the fields in an error of `command`; `names` are the options of every command by field.

    An option that the command does not have is shown together with the first command that has it.

    >>> name = naming("eval", {"run": {"seed": "--seed"}, "eval": {"eval_data": "--data"}})
    >>> name("eval_data"), name("seed")
    ('--data', 'llmquant run --seed')
    """

    def name_of(field: str) -> str:
        if (own := names.get(command, {}).get(field)) is not None:
            return own
        others = (f"llmquant {other} {options[field]}" for other, options in names.items() if field in options)
        return next(others, flag(field))

    return name_of


def normalise(arguments: Sequence[str], options: Mapping[str, Collection[str]]) -> list[str]:
    """`arguments` in our own spelling; `options` are the option names of every command.

    Names of commands in COMMANDS and of options in ALIASES are replaced, and underscores in the name of an option by
    dashes, where that gives an option of the command. All else stays, for the parser to judge.

    >>> normalise(["quantize", "--group_size=32", "--nsamples", "8"], {"run": ["--group-size", "--samples"]})
    ['run', '--group-size=32', '--samples', '8']
    """
    words = list(arguments)
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if at is None:
        return words
    if words[at] not in options:
        words[at] = COMMANDS.get(words[at], words[at])
    known = options.get(words[at], ())
    end = words.index("--") if "--" in words else len(words)
    return [*words[: at + 1], *(_option(word, known) for word in words[at + 1 : end]), *words[end:]]


def _option(word: str, known: Collection[str]) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--") or name in known:
        return word
    dashed = name.replace("_", "-").lower()
    ours = next((option for option in (dashed, *ALIASES.get(dashed, ())) if option in known), name)
    return f"{ours}{equals}{value}"


def suggestion(error: Exception) -> str | None:
    """The one option that was meant, by the parser's error about an unknown one; None for other errors."""
    name, possible = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if not isinstance(name, str) or not possible:
        return None
    return f"{name}: no such option; did you mean {difflib.get_close_matches(name, possible, 1, 0)[0]}?"


def count(text: str | None) -> int | str | None:
    """A number, or a word that the recipe accepts or refuses."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else text


def strength(text: str) -> float | str:
    """A number, or a word that the recipe accepts or refuses."""
    try:
        return float(text)
    except ValueError:
        return text
