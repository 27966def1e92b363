"""Names of tensors, sorted as people count."""

import re


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10.

    >>> sorted(["layers.10", "layers.2"], key=natural_key)
    ['layers.2', 'layers.10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
