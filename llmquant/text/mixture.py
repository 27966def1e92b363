"""Calibration text from several datasets: `a:0.5,b:0.5` takes half of the windows from each."""

from llmquant.errors import CalibrationError, option
from llmquant.paths import expanded

_EXPECTED = "NAME:SHARE,NAME:SHARE,... with shares that add up to 1, such as builtin:0.5,notes.txt:0.5"


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """(name, share) of each part. A spec without a comma is one part, and so is the path of a file.

    CalibrationError for parts without a name or a share, and for shares that do not add up to 1.

    >>> parse_mixture("c4:0.75,owner/name:config:train:text:0.25")
    [('c4', 0.75), ('owner/name:config:train:text', 0.25)]
    >>> parse_mixture("wikitext2")
    [('wikitext2', 1.0)]
    """
    if "," not in spec or expanded(spec, CalibrationError).is_file():
        return [(spec, 1.0)]
    parts: list[tuple[str, float]] = []
    for part in spec.split(","):
        name, _, share = part.strip().rpartition(":")
        try:
            parts.append((name, float(share)))
        except ValueError:
            raise CalibrationError(
                f"{option('calibration')} {spec}", f"{part.strip()!r} has no share", expected=_EXPECTED
            ) from None
    total = sum(share for _, share in parts)
    names = [name for name, _ in parts]
    if not all(names) or len(set(names)) < len(names) or not all(share > 0 for _, share in parts):
        raise CalibrationError(
            f"{option('calibration')} {spec}",
            "a part without a name, twice the same, or not above zero",
            expected=_EXPECTED,
        )
    if not abs(total - 1) < 1e-3:
        raise CalibrationError(f"{option('calibration')} {spec}", f"shares add up to {total:g}", expected=_EXPECTED)
    return parts


def split_samples(parts: list[tuple[str, float]], samples: int) -> list[int]:
    """How many of `samples` windows each part gets: at least one, otherwise as near to its share as possible.

    >>> split_samples([("a", 0.5), ("b", 0.3), ("c", 0.2)], 7)
    [4, 2, 1]
    """
    if samples < len(parts):
        raise CalibrationError(
            option("samples"), str(samples), expected=f"at least one window for each of {len(parts)} datasets"
        )
    counts = [1] * len(parts)
    for _ in range(samples - len(parts)):  # the next window goes to the part that is furthest below its share
        counts[max(range(len(parts)), key=lambda i: parts[i][1] * samples - counts[i])] += 1
    return counts
