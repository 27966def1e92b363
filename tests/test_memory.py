"""Peak memory does not grow with depth, and keeps below the promised bound."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
def test_peak_memory_is_bounded_and_does_not_grow_with_depth() -> None:
    script = Path(__file__).parents[1] / "eval" / "memory.py"
    done = subprocess.run(
        [sys.executable, script, "--blocks", "8", "40"], stdout=subprocess.PIPE, text=True, check=True
    )
    (_, _, few, bound, _), (_, _, many, _, _) = (map(float, line.split()) for line in done.stdout.splitlines()[1:])
    assert many <= 1.05 * few
    assert max(few, many) <= bound
