"""`llmquant push` and `run --push-to-hub`, through the real client against the fake Hub.

The client reads its endpoint at import, so commands run in child processes: a task of this file as a script is a list
of [token, arguments], and its answer exit code, stdout and stderr of each. Tests look at those and at what the Hub
then holds.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import pytest
from fake_hub import serve
from fake_publish import PublishingHub
from huggingface_hub import ModelCard
from once import once
from warm import Task, Warm, serve_tasks, without_pauses

import llmquant
from llmquant.export import export
from llmquant.run_dir.manifest import sha256

RTN: dict[str, Any] = {"group_size": 32, "method": "rtn", "eval_data": "none", "max_shard_size": "60KB"}
WRITER = "hf_CANARYwriter"


class Said(NamedTuple):
    code: int
    out: str
    err: str


# -- the child -------------------------------------------------------------------------------------------------
def child(steps: list[tuple[str, list[str]]]) -> list[Said]:
    import io

    from llmquant.cli.app import main

    said = []
    for token, arguments in steps:
        os.environ["HF_TOKEN"] = token
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = digests(*arguments[1:]) if arguments[0] == "digests" else main(arguments)
        said.append(Said(code, out.getvalue(), err.getvalue()))
    return said


def digests(model: str, revision: str | None = None) -> int:
    import hashlib

    import torch

    from llmquant.source.resolve import open_source

    source = open_source(model, revision)
    for name in sorted(source.tensors):
        data = source.read(name).contiguous().reshape(-1).view(torch.uint8).numpy()
        print(name, source.tensors[name].file, hashlib.sha256(data).hexdigest())
    return 0


class Hub(PublishingHub):
    """And a process that has the real client, with this Hub's endpoint."""

    home: Path
    warm: Warm


def child_of(hub: Hub, **env: str) -> Warm:
    here = Path(__file__).parents[1]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1"}
    settings["PYTHONPATH"] = os.pathsep.join((str(here.parent), str(here)))
    return Warm(__file__, clean | settings | env)


def start(warm: Warm, folder: Path, steps: list[Any]) -> Task:
    (folder / "steps.json").write_text(json.dumps(steps))
    return warm.task([str(folder / "steps.json")], folder)


def run(hub: Hub, folder: Path, steps: list[Any], **env: str) -> list[Said]:
    warm = child_of(hub, **env) if env else hub.warm
    code, out, err = start(warm, folder, steps).wait()
    assert code == 0, err
    if env:
        warm.close()
    return [Said(*said) for said in json.loads(out)]


# -- fixtures ----------------------------------------------------------------------------------------------------
ACCOUNT: dict[str, Any] = {
    "name": "me",
    "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}


def account(token: dict[str, Any]) -> dict[str, Any]:
    return ACCOUNT | {"auth": {"accessToken": token}}


@pytest.fixture(scope="module")
def made(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished folders: `old` of more shards than `new`, `gguf` made from new, and some that are not in order."""
    folder = tmp_path_factory.mktemp("made")
    source = tiny_model("llama")
    for name, flags in {
        "old": {"max_shard_size": "40KB"},
        "new": {"bits": 8},
        "small": {"max_shard_size": "5GB"},
    }.items():
        llmquant.quantize(source, llmquant.make_recipe("x", flags=RTN | flags), folder / name)
    export(folder / "small", "gguf", folder / "gguf")
    for name in ("changed", "bare"):
        (folder / name).mkdir()
        for file in (folder / "small").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "bare" / "manifest.json").unlink()
    (folder / "early").mkdir()
    for file in ("manifest.json", "report.json"):
        (folder / "early" / file).write_text('{"files": {}}')
    data = bytearray((folder / "changed" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "changed" / "model.safetensors").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(Hub()) as hub:
        hub.home = tmp_path_factory.mktemp("home") / "hf"
        hub.warm = child_of(hub)
        yield hub
        hub.warm.close()


@pytest.fixture
def hub(served: Hub) -> Hub:
    """Empty, and no cache of the client's."""
    for held in (served.models, served.lfs, served.attacks, served.calls, served.said, served.log, served.accounts):
        held.clear()
    shutil.rmtree(served.home, ignore_errors=True)
    served.accounts[WRITER] = ACCOUNT
    return served


def push(made: Path, folder: str, repo: str, *options: str, token: str = WRITER) -> tuple[str, list[str]]:
    return token, ["push", str(made / folder), "--repo", repo, *options]


def assert_holds(files: dict[str, bytes], folder: Path, repo: str) -> None:
    """The folder's files, with a card and a manifest for the repository's name; verifiable as they are."""
    local = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files.keys() - {".gitattributes"} == local
    for name in local - {"README.md", "manifest.json"}:
        assert files[name] == (folder / name).read_bytes(), name
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == repo
    assert f'from_pretrained("{repo}")' in card.text or "gguf" in card.data.tags
    manifest = json.loads(files["manifest.json"])
    own = json.loads((folder / "manifest.json").read_text())
    assert manifest["tensors"] == own["tensors"]
    assert {n for n, e in manifest["files"].items() if e != own["files"][n]} == {"README.md"}


# -- what is published -------------------------------------------------------------------------------------------
def test_a_push_is_private_whole_and_seen_all_at_once(hub: Hub, made: Path, tmp_path: Path) -> None:
    first, again, other = run(
        hub, tmp_path, [push(made, "old", "me/m"), push(made, "old", "me/m"), push(made, "gguf", "team/g")]
    )
    assert (first.code, first.out) == (0, f"{hub.endpoint}/me/m\n"), first.err
    assert (again.code, again.out) == (0, first.out), again.err
    assert (other.code, other.out) == (0, f"{hub.endpoint}/team/g\n"), other.err
    assert "all files are there already" in again.err
    repo = hub.models["me/m"]
    assert repo.private
    assert_holds(repo.main, made / "old", "me/m")
    assert_holds(hub.models["team/g"].main, made / "gguf", "team/g")
    assert "llama-cli -hf team/g:Q4_0" in hub.models["team/g"].main["README.md"].decode()
    # One commit, after all weights: nobody ever sees a config without its weights, or an index without a shard.
    calls = hub.calls_of(r"PUT /lfs|POST /api/models/me/m/commit")
    shards = list((made / "old").glob("*.safetensors"))
    assert len(shards) > 3
    assert [call.split()[0] for call in calls[: len(shards) + 1]] == ["PUT"] * len(shards) + ["POST"]
    assert len(repo.commits) == 2  # the Hub's own, and ours
    assert hub.lfs.keys() == {sha256(file) for file in [*shards, *(made / "gguf").glob("*.gguf")]}


def test_what_was_added_stays_here_and_a_card_of_ones_own_is_kept_on_request(
    hub: Hub, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "gguf", tmp_path / "mine")
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "mine" / name).write_text("x")
    card = tmp_path / "mine" / "README.md"
    (plain,) = run(hub, tmp_path, [push(tmp_path, "mine", "me/plain")])
    assert plain.code == 0, plain.err
    assert "not of the run, and not published: .DS_Store, Thumbs.db, notes.txt" in plain.err
    assert_holds(hub.models["me/plain"].main, made / "gguf", "me/plain")
    card.write_text(card.read_text("utf-8") + "\nMy own words, größer.\n", "utf-8")
    refused, kept = run(
        hub, tmp_path, [push(tmp_path, "mine", "me/kept"), push(tmp_path, "mine", "me/kept", "--keep-card")]
    )
    assert refused.code == 8
    assert "README.md: is not as the run wrote it, and would be replaced; --keep-card publishes it" in refused.err
    assert kept.code == 0, kept.err
    files = hub.models["me/kept"].main
    assert files["README.md"] == card.read_bytes()
    manifest = json.loads(files["manifest.json"])
    assert manifest["files"]["README.md"]["sha256"] == sha256(card)
    assert not {".DS_Store", "Thumbs.db", "notes.txt"} & files.keys()


@pytest.mark.parametrize("card", [b"\xff no UTF-8", b"---\nlicense: [\n---\n# m"], ids=["bytes", "yaml"])
def test_a_card_of_ones_own_that_is_none_is_one_line(card: bytes, hub: Hub, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "gguf", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_bytes(card)
    (said,) = run(hub, tmp_path, [push(tmp_path, "mine", "me/mine", "--keep-card")])
    assert said.code == 10
    assert "me/mine: README.md: the Hub does not accept its head" in said.err
    assert "Traceback" not in said.err
    assert hub.models["me/mine"].main.keys() <= {".gitattributes"}


def test_a_new_checkpoint_replaces_the_old_and_a_pinned_revision_keeps_it(hub: Hub, made: Path, tmp_path: Path) -> None:
    steps = [push(made, "old", "me/m", "--tag", "v1"), push(made, "new", "me/m", "--tag", "v1")]
    steps += [push(made, "new", "me/m", "--tag", "v2")] * 2
    steps += [(WRITER, ["digests", *words]) for words in (["me/m", "v1"], [str(made / "old")], ["me/m"])]
    steps += [(WRITER, ["digests", str(made / "new")])]
    first, second, third, again, old, old_here, new, new_here = run(hub, tmp_path, steps)
    assert (first.code, third.code) == (0, 0), first.err + third.err
    assert second.code == 10
    assert "its tag v1 is at another commit" in second.err
    repo = hub.models["me/m"]
    assert_holds(repo.main, made / "new", "me/m")  # the old one's further shards are gone
    assert_holds(repo.commits[repo.tags["v1"]], made / "old", "me/m")
    assert repo.tags["v2"] == repo.refs["main"]
    assert again.code == 0
    assert "all files are there already" in again.err
    # sharded, through the real client: the pinned commit has the old weights, the branch the new ones
    for (remote, local), folder in zip(((old, old_here), (new, new_here)), ("old", "new"), strict=True):
        assert remote.out == local.out
        assert len(remote.out.splitlines()) > 20
        assert len(list((made / folder).glob("*.safetensors"))) > 1
    assert old.out != new.out


def test_public_only_when_asked_and_only_once_it_is_compared(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add("me/open", private=False)
    seen: list[bool] = []
    hub.attacks["GET /api/models/me/new/tree"] = lambda: seen.append(hub.models["me/new"].private)
    steps = [
        push(made, "small", "me/open"),
        push(made, "small", "me/open", "--private"),
        push(made, "small", "me/open", "--public"),
        push(made, "small", "me/new", "--public"),
        push(made, "small", "me/draft"),
        push(made, "small", "me/draft", "--public"),
    ]
    refused, private, opened, new, draft, published = run(hub, tmp_path, steps)
    for said in (refused, private):
        assert said.code == 10
        assert "me/open: is public; expected a private repository; pass --public to publish there" in said.err
    assert [said.code for said in (opened, new, draft, published)] == [0] * 4
    assert seen == [True, True]  # before the upload and at the comparison after it
    assert not hub.models["me/new"].private
    assert not hub.models["me/draft"].private
    assert len(hub.models["me/draft"].commits) == 2


def test_a_pull_request_leaves_the_branch_as_it_is(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add("you/theirs", private=False)
    before = dict(hub.models["you/theirs"].main)
    steps = [
        push(made, "small", "you/theirs", "--create-pr", "--public"),
        push(made, "small", "you/theirs", "--public"),
        push(made, "small", "you/none", "--create-pr"),
        push(made, "small", "me/x", "--create-pr", "--tag", "v1"),
    ]
    opened, direct, missing, both = run(hub, tmp_path, steps)
    assert (opened.code, opened.out) == (0, f"{hub.endpoint}/you/theirs/discussions/1\n"), opened.err
    repo = hub.models["you/theirs"]
    assert repo.main == before
    assert_holds(repo.commits[repo.refs["refs/pr/1"]], made / "small", "you/theirs")
    assert (direct.code, "you is not yours; expected an owner of me, team, club" in direct.err) == (10, True)
    assert (missing.code, "no such repository; a pull request needs one" in missing.err) == (10, True)
    assert (both.code, "--tag: beside --create-pr" in both.err) == (2, True)


# -- what is refused ---------------------------------------------------------------------------------------------
def test_folders_that_verify_rejects_are_not_published(hub: Hub, made: Path, tmp_path: Path) -> None:
    names = ("changed", "bare", "nothing", "early")
    changed, bare, nothing, early = run(hub, tmp_path, [push(made, name, "me/m") for name in names])
    assert [said.code for said in (changed, bare, nothing, early)] == [8, 8, 8, 8]
    assert "model.safetensors: its bytes have changed" in changed.err
    assert "bare: no manifest.json; expected a folder that `llmquant run` or `llmquant export` finished" in bare.err
    assert "nothing: no such folder" in nothing.err
    assert "report.json: is an earlier version's; quantize or export again" in early.err
    assert hub.models == {}


def test_strangers_files_stay(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add("me/mine", files={"pytorch_model.bin": b"x", "manifest.json": b"[]"})
    hub.add("me/notes", files={"README.md": b"# draft"})
    before = dict(hub.models["me/mine"].main)
    refused, taken = run(hub, tmp_path, [push(made, "small", "me/mine"), push(made, "small", "me/notes")])
    assert refused.code == 10
    assert "me/mine: holds files that are not of this checkpoint (pytorch_model.bin); delete them" in refused.err
    assert hub.models["me/mine"].main == before
    assert taken.code == 0
    assert_holds(hub.models["me/notes"].main, made / "small", "me/notes")


def test_damage_on_the_way_is_found_and_not_made_public(hub: Hub, made: Path, tmp_path: Path) -> None:
    def damage() -> None:
        repo = hub.models.get("me/m")
        if repo is not None and "model.safetensors" in repo.main:
            repo.main["model.safetensors"] = b"something else"

    hub.attacks["GET /api/models/me/m/tree"] = damage
    (said,) = run(hub, tmp_path, [push(made, "small", "me/m", "--public")])
    assert (said.code, said.out) == (8, "")
    assert "me/m/model.safetensors: is not what was sent; do not use it" in said.err
    assert hub.models["me/m"].private


ECHO = "no, TOKEN"  # a server that repeats the request's Authorization header
FAILURES: dict[str, tuple[str, Any, str, int]] = {
    "401": (
        "GET /api/models/me/401/auth-check",
        (401, ECHO),
        "the Hub does not accept the token (401)",
        10,
    ),
    "404": (
        "GET /api/models/me/404/auth-check",
        (404, ECHO),
        "no such repository, or it is not yours to see (404)",
        10,
    ),
    "403": ("POST /api/models/me/403/commit", (403, ECHO), "the token may not do this (403)", 10),
    "409": (
        "POST /api/models/me/409/commit",
        (409, ECHO),
        "the repository is being changed by somebody else (409)",
        10,
    ),
    "412": ("POST /api/models/me/412/commit", (412, ECHO), "the repository was changed in the meantime (412)", 10),
    "429": ("POST /api/models/me/429/preupload", (429, ECHO), "too many requests (429)", 10),
    "500": ("POST /api/models/me/500/preupload", (500, ECHO), "the Hub has a failure of its own (500)", 10),
    "503": ("POST /me/503.git/info/lfs", (503, ECHO), "the Hub has a failure of its own (503)", 10),
    "418": ("POST /api/models/me/418/commit", (418, ECHO), "the Hub answered 418", 10),
    "drop": ("POST /api/models/me/drop/commit", "drop", "the connection failed (RemoteProtocolError)", 10),
    "html": ("GET /api/models/me/html/tree", (200, ""), "not an answer of a Hub", 10),
}
TOKENS: dict[str, tuple[Any, str]] = {
    "hf_CANARYunknown": (None, "whoami: the Hub does not accept the token (401)"),
    "hf_CANARYbusy": ((429, ECHO), "whoami: too many requests (429)"),
    "hf_CANARYbroken": ((502, ECHO), "whoami: the Hub has a failure of its own (502)"),
    "hf_CANARYdrop": ("drop", "whoami: the connection failed"),
    "hf_CANARYreader": (account({"role": "read"}), "the token may only read"),
    "hf_CANARYnarrow": (
        account({"role": "fineGrained", "fineGrained": {"scoped": [{"permissions": ["repo.content.read"]}]}}),
        "the token may only read",
    ),
    "": (None, "no token of the Hub; log in with `hf auth login`, or set HF_TOKEN"),
}
NAMES = {"m": "expected owner/name", "me/a b": "expected owner/name in letters", "club/m": "the token may only read"}


def test_every_failure_is_one_line_of_its_own_without_the_token(hub: Hub, made: Path, tmp_path: Path) -> None:
    for name, (pattern, attack, _, _) in FAILURES.items():
        hub.add(f"me/{name}")
        hub.attacks[pattern] = attack
    hub.accounts |= {token: attack for token, (attack, _) in TOKENS.items() if attack is not None}
    steps = [push(made, "small", f"me/{name}", "--debug") for name in FAILURES]
    steps += [push(made, "small", "me/m", token=token) for token in TOKENS]
    steps += [push(made, "small", name) for name in NAMES]
    expected = [(text, code) for _, _, text, code in FAILURES.values()] + [(text, 10) for _, text in TOKENS.values()]
    expected += [(text, 10 if name == "club/m" else 2) for name, text in NAMES.items()]
    said = run(hub, tmp_path, steps)
    for step, answer, (text, code) in zip(steps, said, expected, strict=True):
        assert text in answer.err, (step, answer)
        assert answer.code == code, step
        assert answer.out == ""
        assert "CANARY" not in answer.err, step
        assert len([line for line in answer.err.splitlines() if line.startswith("llmquant: ")]) == 1
    reasons = [re.search(r"^llmquant: .*?: (.*?)[:;]", s.err, re.MULTILINE)[1] for s in said[: len(FAILURES)]]  # type: ignore[index]
    assert len(set(reasons)) == len(reasons)
    assert not any(len(hub.models[f"me/{name}"].commits) > 1 for name in FAILURES)
    assert "me/m" not in hub.models


def test_offline_and_unreachable_make_no_connection_and_say_so(hub: Hub, made: Path, tmp_path: Path) -> None:
    steps = [push(made, "small", "me/m"), (WRITER, ["run", "--model", "demo", "--push-to-hub", "me/m"])]
    for said in run(hub, tmp_path, steps, HF_HUB_OFFLINE="1"):
        assert (said.code, "me/m: HF_HUB_OFFLINE is set; unset it to publish" in said.err) == (10, True)
    assert hub.calls == []
    (gone,) = run(hub, tmp_path, steps[:1], HF_ENDPOINT="http://127.0.0.1:9")
    assert (gone.code, "whoami: the connection failed (ConnectError)" in gone.err) == (10, True)


# -- kills -------------------------------------------------------------------------------------------------------
def end(pid: int) -> None:
    """Kill the process; it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        while True:
            os.kill(pid, 0)
            time.sleep(0.01)


def test_a_killed_push_shows_nothing_and_the_next_sends_only_the_rest(hub: Hub, made: Path, tmp_path: Path) -> None:
    sent: list[int] = []
    pids: Queue[int] = Queue()

    def kill_at_third() -> None:
        sent.append(1)
        if len(sent) == 3:
            end(pids.get())

    hub.attacks["PUT /lfs/"] = kill_at_third
    task = start(hub.warm, tmp_path, [push(made, "old", "me/m")])
    pids.put(task.pid)
    assert task.wait()[0] == -signal.SIGKILL
    assert hub.models["me/m"].main.keys() == {".gitattributes"}  # no config, no index, no weights
    there = set(hub.lfs)
    assert len(there) in (2, 3)
    hub.attacks.clear()
    hub.calls.clear()
    (said,) = run(hub, tmp_path, [push(made, "old", "me/m")])
    assert said.code == 0, said.err
    again = {call.rpartition("/")[2] for call in hub.calls_of("PUT /lfs/")}
    assert len(again) == len(list((made / "old").glob("*.safetensors"))) - len(there)
    assert not again & there
    assert_holds(hub.models["me/m"].main, made / "old", "me/m")


def test_a_push_killed_before_its_commit_only_commits_the_next_time(hub: Hub, made: Path, tmp_path: Path) -> None:
    pids: Queue[int] = Queue()

    def kill() -> None:
        end(pids.get())
        raise ConnectionAbortedError  # the request is lost with the process

    hub.attacks["POST /api/models/me/m/commit"] = kill
    task = start(hub.warm, tmp_path, [push(made, "old", "me/m")])
    pids.put(task.pid)
    task.wait()
    assert hub.models["me/m"].main.keys() == {".gitattributes"}
    hub.attacks.clear()
    hub.calls.clear()
    (said,) = run(hub, tmp_path, [push(made, "old", "me/m")])
    assert said.code == 0, said.err
    assert hub.calls_of("PUT /lfs/") == []
    assert_holds(hub.models["me/m"].main, made / "old", "me/m")


# -- runs --------------------------------------------------------------------------------------------------------
def test_a_run_checks_first_and_publishes_last(hub: Hub, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    hub.accounts["hf_CANARYreader"] = account({"role": "read"})
    hub.add("me/late")
    hub.attacks["POST /api/models/me/late/commit"] = (507, ECHO)
    common = ["--model", str(tiny_model("llama")), "--method", "rtn", "--group-size", "32", "--eval-data", "none"]

    def step(out: str, repo: str, token: str = WRITER) -> tuple[str, list[str]]:
        return token, ["run", *common, "--out", str(tmp_path / out), "--push-to-hub", repo]

    steps = [step("refused", "me/m", "hf_CANARYreader"), step("foreign", "you/m"), step("out", "me/m")]
    steps += [step("late", "me/late"), (WRITER, ["plan", *common, "--push-to-hub", "you/m"])]
    refused, foreign, done, late, plan = run(hub, tmp_path, steps)
    assert (refused.code, foreign.code, plan.code) == (10, 10, 10)
    assert not (tmp_path / "refused").exists()
    assert not (tmp_path / "foreign").exists()
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"{hub.endpoint}/me/m"
    assert hub.models["me/m"].private
    assert_holds(hub.models["me/m"].main, tmp_path / "out", "me/m")
    assert late.code == 10
    assert (
        f"{tmp_path / 'late'} is finished; to publish it: llmquant push {tmp_path / 'late'} --repo me/late" in late.err
    )
    assert (tmp_path / "late" / "manifest.json").is_file()
    # the token is in nothing that was said, written or sent as content
    for path in (*tmp_path.rglob("*"), *hub.home.rglob("*")):
        if path.is_file() and path.name != "steps.json":
            assert b"CANARY" not in path.read_bytes(), path
    assert not any(b"CANARY" in body for body in hub.said)
    assert not any("CANARY" in said.out + said.err for said in (refused, foreign, done, late, plan))
    assert not any(b"CANARY" in data for repo in hub.models.values() for data in repo.main.values())


if __name__ == "__main__":
    without_pauses()
    once(pytest.MonkeyPatch())
    serve_tasks(lambda words: print(json.dumps(child(json.loads(Path(words[0]).read_text())))))
