"""Names of tensors: sorted as people count, and told by kind."""

import re
from collections import Counter
from collections.abc import Iterable


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10.

    >>> sorted(["layers.10", "layers.2"], key=natural_key)
    ['layers.2', 'layers.10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def place_of(name: str) -> tuple[int | None, str]:
    """Block number of a layer, and its kind: the name after that number, further numbers taken out.

    >>> place_of("model.layers.3.mlp.experts.7.up_proj"), place_of("lm_head")
    ((3, 'mlp.experts.*.up_proj'), (None, 'lm_head'))
    """
    match = re.match(r".*?\.(\d+)\.(.+)", name)
    if match is None:
        return None, name
    return int(match[1]), without_numbers(match[2])


def without_numbers(name: str) -> str:
    """A tensor's name with the numbers of its path taken out: its kind.

    >>> without_numbers("model.layers.10.mlp.experts.3.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def kinds(names: Iterable[str]) -> str:
    """What stands for many names in one line: their kinds with counts, at most eight.

    >>> kinds(["layers.0.mlp.up_proj (96)", "layers.1.mlp.up_proj (96)", "lm_head (64)"])
    '2 x layers.*.mlp.up_proj (96), lm_head (64)'
    """
    counts = Counter(re.sub(r"(?<=\.)\d+(?=[. ]|$)", "*", name) for name in names)
    said = [kind if count == 1 else f"{count} x {kind}" for kind, count in counts.most_common(8)]
    return ", ".join([*said, *[f"and {len(counts) - 8} more kinds"] * (len(counts) > 8)])
