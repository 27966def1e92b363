"""What config.json tells loaders of each linear, read anew: no code is shared with `formats`, which wrote it."""

import re
from collections.abc import Sequence
from typing import Any

from llmquant.errors import VerifyError
from llmquant.report.ledger import TensorRow

Scheme = tuple[Any, Any]  # bits, group size


def check_schemes(told: dict[str, Any], rows: Sequence[TensorRow]) -> None:
    """VerifyError unless the quantization config `told` gives every quantized row of the ledger its own scheme."""
    by_name = _named(told)
    patterns = [
        (re.compile(pattern.removeprefix("+:")), _scheme(told | entry))
        for pattern, entry in told.get("dynamic", {}).items()
    ]
    for row in rows:
        if row.scheme is None:
            continue
        name = row.of_module
        found = by_name.get(name) or next((scheme for pattern, scheme in patterns if pattern.match(name)), None)
        found = found or by_name.get("Linear") or _scheme(told)
        if found != (wanted := (row.scheme.bits, row.scheme.group_size)):
            raise VerifyError(
                f"config.json: {name}",
                f"{found[0]} bits in groups of {found[1]}",
                expected=f"{wanted[0]} bits in groups of {wanted[1]}",
            )


def _named(told: dict[str, Any]) -> dict[str, Scheme]:
    """Schemes by the names of modules, also without their first part, which stored names may lack."""
    entries = [(name, _scheme(told | entry)) for name, entry in told.items() if isinstance(entry, dict)]
    for group in told.get("config_groups", {}).values():
        weights = group["weights"]
        scheme = (weights["num_bits"], -1 if weights["strategy"] == "channel" else weights["group_size"])
        entries += [(target, scheme) for target in group["targets"]]
    return {name.partition(".")[2]: scheme for name, scheme in entries} | dict(entries)


def _scheme(entry: dict[str, Any]) -> Scheme:
    return entry.get("bits"), entry.get("group_size")
