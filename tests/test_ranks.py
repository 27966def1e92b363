"""Several processes at one run (torchrun): what they write is what one writes; whatever one meets ends all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from broken import TINY, files, run, weights
from pretend_device import on_pretend_device
from together import Ended, on_ranks
from torch import Tensor

from llmquant import loop
from llmquant.blocks.forwards import Step
from llmquant.blocks.solve import _owners
from llmquant.cli.app import main
from llmquant.errors import SolveError
from llmquant.preflight.estimate import estimate
from llmquant.ranks import Ranks
from llmquant.recipe import RunOptions, make_recipe
from llmquant.text import windows

pytestmark = pytest.mark.usefixtures("short_runs", "small_batches")


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Batches of 64 tokens: two windows of calibration, or one of evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows.windows_per_batch, "__defaults__", (64,))
        yield


TEXT: dict[str, Any] = TINY | {"samples": 10, "eval_tokens": 320}  # five batches each, which no number of ranks divides


def arguments(model: Path, out: Path, **flags: Any) -> list[str]:
    options = [part for name, value in (TEXT | flags).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["run", "--model", str(model), "--out", str(out), "--eval-data", "builtin", *options]


def together(size: int, model: Path, out: Path, **flags: Any) -> list[Ended]:
    return on_ranks(size, lambda rank: main(arguments(model, out, **flags)), out.parent)


def alone(model: Path, out: Path, **flags: Any) -> dict[str, bytes]:
    run(model, out, **(TEXT | {"eval_data": "builtin"} | flags))
    return files(out)


def rounded(value: Any) -> Any:
    """Numbers to six digits: errors of layers are products of the rows that a rank has, which may differ in the last
    bit."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def same(out: Path, wanted: dict[str, bytes]) -> bool:
    """All files but the hashes of the report, and the report to six digits."""
    found = files(out)
    reports = [rounded(json.loads(one["report.json"])) for one in (found, wanted)]
    left = [
        {name: data for name, data in one.items() if name not in ("report.json", "manifest.json", "README.md")}
        for one in (found, wanted)
    ]
    return reports[0] == reports[1] and left[0] == left[1]


@pytest.fixture(scope="module")
def reference(model: Path, small_batches: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    return alone(model, tmp_path_factory.mktemp("alone") / "out")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_process_writes(
    size: int, model: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    ended = together(size, model, tmp_path / "out")
    assert [one.code for one in ended] == [0] * size, ended
    assert files(tmp_path / "out") == reference
    assert "block 3/3" in ended[0].err
    assert not any(one.err or one.out for one in ended[1:])


MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "one pass": ("llama", {"passes": "block"}),
    "no curvature": ("qwen2", {"curvature": "off", "products": "float32"}),
    "nearest": ("llama", {"method": "rtn"}),
    "tied, embedding and head": ("gemma2", {"format": "mlx", "embed_bits": 8}),
    "parked": ("gemma4", {"max_ram": "1GB"}),
    "streams in files": ("llama", {"max_ram": "1KB"}),
}


@pytest.mark.parametrize("case", MORE)
def test_so_does_every_way_through(case: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    name, flags = MORE[case]
    wanted = alone(tiny_model(name), tmp_path / "alone" / "out", **flags)
    ended = together(2, tiny_model(name), tmp_path / "out", **flags)
    assert [one.code for one in ended] == [0, 0], ended
    assert same(tmp_path / "out", wanted)


@pytest.mark.parametrize("on_demand", [False, True])
def test_experts_are_dealt_out(on_demand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 2}
    model = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", flags))
    if on_demand:
        monkeypatch.setattr("llmquant.draft.physical_memory", lambda: 1000)
    wanted = alone(model, tmp_path / "alone" / "out")
    ended = together(2, model, tmp_path / "out")
    assert [one.code for one in ended] == [0, 0], ended
    assert same(tmp_path / "out", wanted)


@on_pretend_device
def test_ranks_have_accelerators(model: Path, tmp_path: Path) -> None:
    flags = {"dtype": "float32", "products": "float32", "device": "pretend"}
    ended = together(2, model, tmp_path / "out", **flags)  # first: no fork has a backward behind it
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert same(tmp_path / "out", alone(model, tmp_path / "alone" / "out", **flags))


def test_each_rank_first_is_another_order_of_the_same_sums(
    model: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        assert [one.code for one in together(2, model, tmp_path / name / "out", rank_sums="rank")] == [0, 0]
    assert files(tmp_path / "one" / "out") == files(tmp_path / "again" / "out")
    assert weights(tmp_path / "one" / "out").keys() == {name for name in reference if name.endswith(".safetensors")}


def killing(rank: int, block: int, blow: Callable[[], None]) -> Callable[[Any, Any, Any, float], None]:
    """`Loop._say` of a run in which something happens to one rank behind a block."""
    say = loop.Loop._say

    def said(self: Any, of: Any, solved: Any, seconds: float) -> None:
        say(self, of, solved, seconds)
        if (self.ranks.rank, of.index) == (rank, block):
            blow()

    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_another_number_goes_on(
    rank: int, model: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_say", killing(rank, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        ended = together(2, model, tmp_path / "out")
    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code == 11
    lines = [line for one in ended for line in one.err.splitlines() if "another rank has ended" in line]
    assert len(lines) == 1, ended
    assert "Traceback" not in ended[1 - rank].err
    ended = together(3, model, tmp_path / "out", resume="required")
    assert [one.code for one in ended] == [0, 0, 0], ended
    assert "streams after block 1: from the snapshot" in ended[0].err or rank == 0
    assert files(tmp_path / "out") == reference


def test_one_process_goes_on_with_the_work_of_two(
    model: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_say", killing(1, 0, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        together(2, model, tmp_path / "out")
    run(model, tmp_path / "out", resume="required", **(TEXT | {"eval_data": "builtin"}))
    assert files(tmp_path / "out") == reference


def test_a_stuck_rank_ends_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Loop, "_say", killing(1, 0, lambda: time.sleep(10)))
    ended = together(2, model, tmp_path / "out", rank_timeout=0.1)
    assert [one.code for one in ended] == [11, 11]  # the stuck one by its own clock: here is no torchrun to end it
    assert "another rank has ended or does not answer" in ended[0].err.splitlines()[-1]


def failing() -> None:
    raise SolveError("model.layers.0", "no layer", remedy="none")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_said_once(
    rank: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Loop, "_say", killing(rank, 0, failing))
    ended = together(2, model, tmp_path / "out")
    assert ended[rank].code == 3
    assert ended[1 - rank].code == 11
    assert ended[rank].err.splitlines()[-1] == "llmquant: model.layers.0: no layer; none"
    assert not any("another rank" in one.err for one in ended), [one.err for one in ended]
    assert "1 of 3 blocks are kept" in ended[0].err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"recover": "norms"}, "--recover: 2 ranks; expected one process"),
        ({"target_bpw": 5}, "--target-bpw: 2 ranks; expected one process"),
        ({"samples": 2}, "2 ranks: 1 batches of calibration text; expected one for each rank at least"),
        ({"bits": 9}, "--bits"),
        ({"device": "cuda:1"}, "--device: cuda:1; expected cuda: each rank has the GPU of its local number"),
        ({"rank_sums": "all"}, "--rank-sums: 'all'; expected batch or rank"),
    ],
)
def test_what_ranks_cannot_do_is_refused_once(flags: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    ended = together(2, model, tmp_path / "out", **flags)
    assert [one.code for one in ended] == [2, 2]
    lines = [line for one in ended for line in one.err.splitlines() if line.startswith("llmquant: ")]
    assert len(lines) == 1, ended
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["batch", "rank"])
def test_a_plan_knows_what_each_rank_sends(
    order: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the codes, which go with their losses and notes."""
    counted = [0]
    parts_at, of_rank = Ranks.parts_at, Ranks.of_rank

    def to_owner(self: Ranks, owner: int, tensor: Tensor) -> list[Tensor]:
        counted[0] += tensor.nbytes * (owner != self.rank)
        return parts_at(self, owner, tensor)

    def from_owner(self: Ranks, owner: int, tensor: Tensor) -> Tensor:
        counted[0] += tensor.nbytes * (self.size - 1) * (owner == self.rank)
        return of_rank(self, owner, tensor)

    monkeypatch.setattr(Ranks, "parts_at", to_owner)
    monkeypatch.setattr(Ranks, "of_rank", from_owner)
    flags = {"rank_sums": order, "propagation": 0.5}

    def work(rank: int) -> int:
        code = main(arguments(model, tmp_path / "out", **flags))
        (tmp_path / f"sent-{rank}").write_text(str(counted[0]))
        return code

    assert [one.code for one in on_ranks(2, work, tmp_path)] == [0, 0]
    recipe = make_recipe(str(model), flags=TEXT | {"eval_data": "builtin", "propagation": 0.5})
    plan = estimate(model, recipe, RunOptions(tmp_path / "planned", ranks=Ranks(0, 2, order == "batch")))
    codes = sum(kind.count * kind.shape[0] * kind.shape[1] for kind in plan.kinds if kind.bits is not None) // 2
    assert [int((tmp_path / f"sent-{rank}").read_text()) for rank in (0, 1)] == [plan.sent_bytes - codes] * 2


def test_a_plan_of_ranks_is_of_each(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(str(model), flags=TEXT | {"eval_data": "builtin"})
    one, five = (estimate(model, recipe, RunOptions(tmp_path / "out", ranks=Ranks(0, size))) for size in (1, 5))
    assert five.memory["streams in memory"] * 5 == one.memory["streams in memory"]
    assert five.memory["sums of other ranks"] > 0 == one.memory.get("sums of other ranks", 0)
    assert (one.sent_bytes, one.ranks, five.ranks) == (0, 1, 5)
    assert 0 < five.sent_bytes_of_block < five.sent_bytes
    refused = estimate(model, recipe, RunOptions(tmp_path / "out", ranks=Ranks(0, 5)), timed=True)
    assert [problem.exit_code for problem in refused.problems if problem.blocking] == [2]


@pytest.mark.parametrize("command", [["doctor"], ["run", "--model", "demo", "--dry-run"]])
def test_other_commands_are_not_for_ranks(command: list[str], tmp_path: Path) -> None:
    ended = on_ranks(2, lambda rank: main(command), tmp_path)
    assert [one.code for one in ended] == [2, 2]
    assert ended[0].err == "llmquant: 2 ranks: llmquant run alone knows them; leave torchrun out\n"
    assert not ended[1].err


def test_the_dearest_steps_are_dealt_out_first() -> None:
    specs = [type("Spec", (), {"shape": shape})() for shape in ((64, 32), (32, 64), (64, 32), (32, 64))]
    owners = _owners([Step([spec], 0.0) for spec in specs], 2)  # type: ignore[list-item]
    assert sorted(owners) == [0, 0, 1, 1]
    assert owners[1] != owners[3]


def test_shares_are_the_items_again() -> None:
    items = list(range(11))
    for size in (1, 2, 3, 16):
        shares = [Ranks(rank, size).share(items) for rank in range(size)]
        assert Ranks(0, size).in_order(shares) == items


@pytest.mark.soak
def test_torchrun_itself(model: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Batches are of the usual size here, so the bytes are those of another run."""
    for name, size in (("one", 1), ("two", 2)):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "llmquant"]
        command = [*torchrun, *arguments(model, tmp_path / name, samples=200)]
        subprocess.run([sys.executable, *command], check=True, timeout=300, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
