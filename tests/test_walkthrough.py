"""The walkthrough runs from its first cell to its last, and prints what the committed one shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "pipelines"
NOTEBOOK = json.loads((FOLDER / "walkthrough.ipynb").read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")

# A notebook without magics is a Python program in pieces; no kernel and no sockets are needed to run it.
RUN = """
import contextlib, io, json, sys, warnings
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, f"<code cell {number}>", "exec"), names)
    print(json.dumps([out.getvalue(), len(plt.get_fignums())]), flush=True)
    plt.close("all")
"""


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def n_figures(cell: dict[str, Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_every_cell_runs_and_prints_what_is_committed() -> None:
    sources = ["".join(cell["source"]) for cell in CELLS]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=FOLDER,
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ran) == len(CELLS)
    for number, (cell, (text, figures)) in enumerate(zip(CELLS, ran, strict=True)):
        difference = disagreement(printed(cell), text)
        assert not difference, f"code cell {number}: {difference}; run it anew (CONTRIBUTING.md) and read what it says"
        assert n_figures(cell) == figures, f"code cell {number}"


def disagreement(committed: str, fresh: str) -> str:
    """Empty where both say the same: words equal, integers within a fifth, decimals within a half or five units of
    their last place, and percentages within six points.

    Threads and processors round differently, a solver then chooses other codes, and texts here are short.
    """
    if "".join(NUMBER.sub("#", committed).split()) != "".join(NUMBER.sub("#", fresh).split()):
        return f"committed {committed!r}, fresh {fresh!r}"
    for a, b in zip(NUMBER.finditer(committed), NUMBER.finditer(fresh), strict=True):
        x, y = (float(found[0].replace(",", "")) for found in (a, b))
        decimals = len(a[0].partition(".")[2])
        percent = committed[a.end() : a.end() + 1] == "%"
        least = 6.0 if percent else 5 * 10.0**-decimals if decimals else 0.0
        if abs(x - y) > max((0.5 if decimals else 0.2) * max(abs(x), abs(y)), least):
            return f"{a[0]} is committed, {b[0]} fresh"
    return ""


@pytest.mark.parametrize(
    ("committed", "fresh", "same"),
    [
        ("KL 0.00310 ± 0.00012", "KL  0.00322 ± 0.00013", True),
        ("KL 0.00310", "KL 0.00710", False),
        ("( -5.2%)  0.00310", "(-10.4%)  0.00410", True),
        ("1,024 codes", "1,300 codes", False),
        ("KL 0.1", "kl 0.1", False),
        ("change -12.4%", "change +12.4%", False),
        ("one", "one 2", False),
    ],
)
def test_disagreement(committed: str, fresh: str, same: bool) -> None:
    assert (disagreement(committed, fresh) == "") is same


def test_the_committed_outputs_are_whole_and_clean() -> None:
    figures = sum(n_figures(cell) for cell in CELLS)
    assert figures >= 8
    assert figures == sum("".join(cell["source"]).count("plt.show()") for cell in CELLS)
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    for cell in CELLS:
        assert not cell["metadata"], "times of one machine"
        assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in cell["outputs"])
        assert not re.search(r"/(home|tmp|root|Users)/", printed(cell))
