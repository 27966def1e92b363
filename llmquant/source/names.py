"""Names of tensors: sorted as people count, and told by kind."""

import re


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
