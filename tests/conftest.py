"""Fixtures: tiny models built once per session, and the one door to ../shared."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from broken import files, run
from once import DRAW, once

from llmquant import pipeline
from llmquant.blocks import snapshots
from llmquant.report import plots
from llmquant.text.corpus import DATASETS, Text

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network; the fake Hub's run in a child process
# One core per worker of pytest-xdist; a forked child could not use the threads of its parent.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for other children
torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter then
    os.environ["TRITON_INTERPRET"] = "1"


# Files of a quarter of a minute and more, longest first: a worker takes whole files (`--dist loadfile`), so that none
# makes another's fixtures again, and would end alone with a long one that it took last.
LONG = ("test_pipeline", "test_resume", "test_walkthrough", "test_gguf", "test_blocks", "test_hub_source", "test_push")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        once(patch)
        yield


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """Pages with their drawings, as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_svg", DRAW)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a tiny random checkpoint by architecture name, built on first use."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            known = tiny.ARCHITECTURES | tiny.PARKED | {"gpt2": tiny.GPT2_ARCHITECTURE}
            architecture = known[name]
            built[name] = tiny.build(tmp_path_factory.mktemp("models") / name, architecture)
        return built[name]

    return get


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the project; tests that want it are skipped where it is not."""
    folder = Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("needs the assets in ../shared, which are not part of the project")
    return folder


@pytest.fixture(scope="module")
def short_runs() -> Iterator[None]:
    """For files that make hundreds of runs: what takes their time, plots and the tokens of a whole book, left out.

    Their streams are snapshotted after every block, as those of a run with blocks of a minute are.
    """
    whole = DATASETS["builtin"]

    def part(split: str, limit: int) -> Text:
        text = whole(split, limit)
        return Text(text.name, [document[:20_000] for document in text.documents])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_html", lambda name, report: f"<p>{name}</p>")
        patch.setitem(DATASETS, "builtin", part)
        patch.setattr(snapshots, "MIN_SECONDS", 0.0)
        patch.setattr(snapshots, "PAUSE", 0.0)
        yield


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def wanted(model: Path, short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a run of `model` that nothing disturbed: a resumed run must end with the same."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    run(model, out)
    return files(out)
