"""What the original's model card says and what stays true for the quantized model: licence, languages, data, task."""

from typing import Any

from llmquant.log import Progress
from llmquant.source.base import Source

KEYS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_SHORT = 300  # most characters of one value; names of licences and ids are far shorter


def read_card(source: Source, log: Progress) -> dict[str, Any]:
    """Licence, languages, training data and task from the card of `source`; {} if it has no card.

    The card is a stranger's text, so only short strings and lists of them are taken.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if "README.md" not in source.files():
        return {}
    try:
        data = metadata_load(source.local("README.md")) or {}
    except (ValueError, RecursionError, YAMLError) as error:
        log.line(f"README.md of {source.name} cannot be read ({type(error).__name__}): the licence is not taken over")
        return {}
    return {key: data.get(key) for key in KEYS if _is_plain(data.get(key))}


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, str) and v.isprintable() and 0 < len(v) <= _SHORT for v in values)
