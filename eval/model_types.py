"""Which model types pass: python eval/model_types.py [--only 'qwen*' mixtral] [--again refused crash wrong] [--write]

Takes a tiny random checkpoint of every type of the installed transformers through llmquant, compares the output with
stock transformers (`tests/contract/check.py`), and prints a line for each. A type has a process of its own and
--seconds of time. Results are kept in --results, and the same command goes on after the last one; --fresh measures all
of them anew. --write puts what is known into tests/contract/outcomes.json and docs/models.md. All types take about
ten minutes on one core.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytest
import torch
import transformers
from contract import table
from contract.build import types, variants
from contract.check import check
from contract.kinds import kind_of
from contract.uploads import UPLOADS
from once import once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="types, or patterns such as 'qwen*'")
    parser.add_argument("--again", nargs="+", default=[], metavar="RESULT", help="measure those with this result again")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are kept")
    parser.add_argument("--write", action="store_true", help="write outcomes.json and docs/models.md")
    parser.add_argument("--results", type=Path, default=Path("build/model_types.jsonl"))
    parser.add_argument("--seconds", type=float, default=180.0, help="for one type")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        arguments.results.unlink(missing_ok=True)
    known = {name: row for name, row in read(arguments.results).items() if row["result"] not in arguments.again}
    everything = [*types(), *variants(), *UPLOADS]
    wanted = [name for name in everything if any(fnmatch(name, pattern) for pattern in arguments.only)]
    if not wanted:
        parser.error(f"--only: no type is called {' or '.join(arguments.only)}")
    print(f"{sum(name in known for name in wanted)} of {len(wanted)} are known from {arguments.results}", flush=True)
    missing = [name for name in wanted if name not in known]
    with warm() if missing else nullcontext():
        for name in missing:
            known[name] = judged(name, arguments.seconds)
            with arguments.results.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
            say(known[name])
    results = Counter(known[name]["result"] for name in wanted)
    print(", ".join(f"{count} {result}" for result, count in results.most_common()))
    causes = Counter(table.short(known[name]["cause"]) for name in wanted if known[name]["result"] == "refused")
    print("".join(f"  {count} refused: {cause}\n" for cause, count in causes.most_common()), end="")
    if arguments.write:
        write(everything, known)
    return int(bool(results["crash"] or results["wrong"]))


@contextmanager
def warm() -> Iterator[None]:
    """What a run imports on its way is imported once, before the forks; and no report is drawn."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        once(patch)
        check("llama", Path(folder))
        yield


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of each name."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def judged(name: str, seconds: float) -> dict[str, Any]:
    """The outcome of one type, in a fork that may crash or hang."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    begin, folder = time.perf_counter(), Path(tempfile.mkdtemp())
    child = context.Process(target=work, args=(name, folder, theirs))
    child.start()
    theirs.close()
    try:
        row: dict[str, Any] = ours.recv() if ours.poll(seconds) else {"cause": f"no answer within {seconds:.0f} s"}
    except EOFError:
        child.join()
        row = {"cause": f"the process ended with {child.exitcode}"}
    finally:
        child.kill()
        child.join()
        shutil.rmtree(folder)
    took = round(time.perf_counter() - begin, 1)
    return {"name": name, "kind": "unknown", "result": "crash"} | row | {"seconds": took}


def work(name: str, folder: Path, answer: Connection) -> None:
    torch.set_num_threads(1)  # makes torch's pool anew, before threads of the loader race to do it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress of other libraries
    try:
        row = {"kind": kind_of(name)} | check(name, folder).as_dict()
    except Exception:  # of the check itself
        row = {"cause": traceback.format_exc()}
    answer.send(row)


def say(row: dict[str, Any]) -> None:
    figures = "".join(f" {key} {value:.3g}" for key, value in row.get("figures", {}).items())
    trace = f" [{' < '.join(reversed(row['trace']))}]" if row["result"] in ("crash", "wrong") and "trace" in row else ""
    cause = row.get("cause", "")
    print(f"{row['name']:26} {row['result']:9} {row['seconds']:5.1f} s{figures} {cause}{trace}".rstrip(), flush=True)


def write(everything: list[str], known: dict[str, dict[str, Any]]) -> None:
    """What was measured over what the table says; names that transformers no longer has are dropped."""
    _, old = table.load()
    rows = {name: row for name, row in {**old, **known}.items() if name in everything}
    table.save(transformers.__version__, rows)
    version, rows = table.load()
    missing = [name for name in everything if name not in rows]
    if missing:
        print(f"{table.FILE.name} is written; docs/models.md is not: {len(missing)} names were never measured")
        return
    table.DOCS.parent.mkdir(exist_ok=True)
    table.DOCS.write_text(table.docs(version, rows), "utf-8")
    print(f"{table.FILE.name} and docs/models.md are written; python .ci/readme.py brings README up to date, ", end="")
    print("where it has <!-- generated: models --> and <!-- end -->")


if __name__ == "__main__":
    sys.exit(main())
