"""Models on the Hub, through the real client against a fake Hub.

The client reads its endpoint at import, so it runs in child processes: this file as a script. Each child does a
number of things and writes what it saw as JSON; the tests look at that and at the fake Hub's log.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, Request, commit_of, fake_hub
from gguf_files import gguf_of, quantized
from once import once
from safetensors.torch import save_file
from tiny import ARCHITECTURES, build
from warm import without_pauses

from llmquant.checkpoint import open_checkpoint
from llmquant.errors import SourceError
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions
from llmquant.source import hub as hub_module
from llmquant.source.base import Source
from llmquant.source.files import INDEX, SINGLE
from llmquant.source.header import build_header
from llmquant.source.resolve import open_source

SHARDS = ("model-1.safetensors", "model-2.safetensors")
TOKEN = "hf_canaryThatMustNotSing0123456789abcd"
BAD = ("gated", "busy", "broken", "html", "foreign")


# -- what the children do ------------------------------------------------------------------------------
def digest(tensor: torch.Tensor) -> str:
    data = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def message_of(model: str, revision: str | None = None) -> str:
    try:
        open_source(model, revision)
    except SourceError as error:
        return str(error)
    except Exception as error:  # so that one bug does not hide what the child saw elsewhere
        return f"{type(error).__name__} escaped: {error}"
    return "opened"


def digest_or_message(source: Source, name: str) -> str:
    try:
        return digest(source.read(name))
    except SourceError as error:
        return str(error)


def local_shards(source: Source) -> list[str]:
    return sorted({info.file for name, info in source.tensors.items() if source.is_local(name)})


def child_online(folder: Path) -> dict[str, Any]:
    import llmquant

    opened = open_source("user/opened")
    read = open_source("user/read", "main")
    first = next(name for name, info in read.tensors.items() if info.file == SHARDS[0])
    read.read(first)
    after_first = local_shards(read)
    prefetched = open_source("user/prefetched")
    prefetched.prefetch(name for name, info in prefetched.tensors.items() if info.file == SHARDS[1])
    deadline = time.monotonic() + 200
    while not local_shards(prefetched) and time.monotonic() < deadline:
        time.sleep(0.02)
    flags = {"bits": 4, "group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 64, "eval_seq_len": 32}
    report = llmquant.quantize("user/llama", llmquant.make_recipe("user/llama", flags=flags), folder / "out")
    planned = estimate(
        "user/planned", llmquant.make_recipe("user/planned", flags=flags), RunOptions(folder / "planned")
    )
    rangeless = open_source("user/rangeless")
    flaky = open_source("user/flaky")
    one, other = ([name for name, info in flaky.tensors.items() if info.file == shard] for shard in SHARDS)
    attempts = [digest_or_message(flaky, one[0]), digest_or_message(flaky, one[0])]
    flaky.prefetch(other)
    futures.wait([flaky._fetched[SHARDS[1]]], timeout=60)  # type: ignore[attr-defined]
    attempts.append(digest_or_message(flaky, other[0]))
    errors = {f"user/{name}": message_of(f"user/{name}") for name in (*BAD, "unknown", "empty-shard")}
    errors |= {"revision": message_of("user/opened", "v9"), "id": message_of("not/a/hub/id")}
    hub_module.TIMEOUT = 0.3
    errors["user/silent"] = message_of("user/silent")
    return {
        "opened": {
            "name": opened.name,
            "revision": opened.revision,
            "folder": sorted(path.name for path in opened.folder.iterdir()),
            "tensors": {name: [i.file, str(i.dtype), list(i.shape)] for name, i in opened.tensors.items()},
            "local_shards": local_shards(opened),
        },
        "read": {"after_first": after_first, "tensors": {name: digest(read.read(name)) for name in read.tensors}},
        "prefetched": local_shards(prefetched),
        "planned": {"estimate": planned.as_dict(), "local_shards": local_shards(open_source("user/planned"))},
        "flaky": {"asked": [one[0], one[0], other[0]], "got": attempts},
        "rangeless": {name: list(info.shape) for name, info in rangeless.tensors.items()},
        "errors": errors,
        "report": report.data,
        "gguf": opened_gguf(),
    }


def opened_gguf(revision: str | None = None) -> dict[str, Any]:
    source = open_checkpoint("user/gguf", revision)
    return {
        "name": source.name,
        "revision": source.revision,
        "tensors": {name: digest(source.read(name)) for name in source.tensors},
    }


def child_secrets(folder: Path) -> dict[str, Any]:
    """Command lines that succeed, are refused and crash in the middle, all of them as talkative as can be."""
    from llmquant import loop
    from llmquant.cli import app as cli

    options = [
        "--group-size",
        "32",
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--eval-tokens",
        "64",
        "--eval-seq-len",
        "32",
        "--debug",
    ]
    codes = {}
    for name in ("llama", "gated", "unknown", "broken"):
        codes[name] = cli.main(["run", "--model", f"user/{name}", "--out", str(folder / "secret" / name), *options])
    real = loop.Loop._say

    def crash(self: Any, block: Any, *rest: Any) -> None:
        real(self, block, *rest)
        raise RuntimeError(f"a bug in block {block.index}")

    loop.Loop._say = crash  # type: ignore[method-assign]
    try:
        cli.main(["run", "--model", "user/llama", "--out", str(folder / "secret" / "crashed"), *options, "--json"])
    except RuntimeError:
        traceback.print_exc()
    return {"codes": codes}


def child_offline(folder: Path) -> dict[str, Any]:
    cached = open_source("user/read", commit_of("user/read"))
    return {
        "message": message_of("user/uncached"),
        "revision": cached.revision,
        "tensors": {name: digest(cached.read(name)) for name in cached.tensors},
        "gguf": opened_gguf(commit_of("user/gguf")),
    }


def child_stalled(folder: Path) -> dict[str, Any]:
    source = open_source("user/stalled")
    source.prefetch(source.tensors)
    deadline = time.monotonic() + 200
    while not (begun := list((folder / "hf").rglob("*.incomplete"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"begun": len(begun)}


def child_unreachable(folder: Path) -> dict[str, Any]:
    return {"message": message_of("user/uncached")}


# -- fixtures ------------------------------------------------------------------------------------------
def run_child(what: str, folder: Path, endpoint: str, **env: str) -> dict[str, Any]:
    """What `child_<what>` returned in a fresh process."""
    here = Path(__file__).parents[1]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN}
    settings["PYTHONPATH"] = os.pathsep.join((str(here.parent), str(here)))
    command = [sys.executable, __file__, what, str(folder)]
    child = subprocess.run(command, env=clean | settings | env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    (folder / f"{what}.said").write_text(child.stdout + child.stderr)
    answers: dict[str, Any] = json.loads((folder / f"{what}.json").read_text())
    return answers


def write_sharded(folder: Path) -> Path:
    """A checkpoint with two shards that are larger than what opening reads of them."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in SHARDS:
        tensors = {
            f"{shard[:7]}.{dtype}": torch.randn(2**18, generator=generator).reshape(512, 512).to(dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32)
        }
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for file in ("config.json", "tokenizer.json", "LICENSE", "README.md", "pytorch_model.bin", "modeling_evil.py"):
        (folder / file).write_text("{}")
    return folder


def write_large(folder: Path) -> Path:
    """A checkpoint of one file of 64 MiB, most of it a hole."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    head, _ = build_header({"w": (torch.int8, (2**26,))})
    (folder / SINGLE).write_bytes(head)
    os.truncate(folder / SINGLE, len(head) + 2**26)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        sharded = write_sharded(folder / "sharded")
        small = folder / "small"
        small.mkdir()
        (small / "config.json").write_text("{}")
        save_file({"w": torch.ones(1)}, small / SINGLE)
        damaged = folder / "empty-shard"
        damaged.mkdir()
        (damaged / "config.json").write_text("{}")
        (damaged / SINGLE).write_bytes(b"")
        hub.repos = dict.fromkeys(
            ("user/opened", "user/read", "user/prefetched", "user/flaky", "user/stalled"), sharded
        )
        hub.repos |= {f"user/{failure}": small for failure in (*BAD, "silent")} | {"user/empty-shard": damaged}
        hub.repos["user/llama"] = build(folder / "llama", ARCHITECTURES["llama"], shard="100KB")
        (hub.repos["user/llama"] / "README.md").write_text("---\nlicense: mit\n---\n")
        hub.repos["user/gguf"] = gguf_of(quantized(hub.repos["user/llama"], folder / "quantized")).parent
        hub.repos["user/planned"] = hub.repos["user/llama"]
        hub.repos["user/rangeless"] = write_large(folder / "large")
        hub.failures = {f"user/{failure}": failure for failure in (*BAD, "silent", "rangeless", "flaky", "stalled")}
        yield hub


@pytest.fixture(scope="module")
def online(hub: FakeHub, folder: Path) -> dict[str, Any]:
    return run_child("online", folder, hub.endpoint)


def weight_requests(hub: FakeHub, repo: str) -> list[Request]:
    """GET requests for bytes of shards."""
    return [r for r in hub.requests(repo) if r.path.startswith("/cdn/") and r.method == "GET"]


# -- tests ---------------------------------------------------------------------------------------------
def test_the_gguf_file_of_a_repository_is_read(online: dict[str, Any], hub: FakeHub) -> None:
    here = open_checkpoint(hub.repos["user/gguf"])
    tensors = {name: digest(here.read(name)) for name in here.tensors}
    expected = {"name": "user/gguf", "revision": commit_of("user/gguf"), "tensors": tensors}
    assert online["gguf"] == expected
    resolved = [r.path.rpartition("/")[2] for r in hub.requests("user/gguf") if "/resolve/" in r.path]
    assert set(resolved) == {"model-Q4_0.gguf"}


def test_revision_is_pinned_to_the_commit_of_the_branch(online: dict[str, Any], hub: FakeHub) -> None:
    commit = commit_of("user/opened")
    assert (online["opened"]["name"], online["opened"]["revision"]) == ("user/opened", commit)
    resolved = [r.path for r in hub.requests("user/opened") if "/resolve/" in r.path]
    assert resolved
    assert all(f"/resolve/{commit}/" in path for path in resolved)
    assert len([r for r in hub.requests("user/opened") if r.path.startswith("/api/") and r.status == 200]) == 1


def test_opening_knows_all_tensors_and_fetches_side_files(online: dict[str, Any], folder: Path) -> None:
    here = open_source(folder / "sharded")
    assert online["opened"]["tensors"] == {
        name: [i.file, str(i.dtype), list(i.shape)] for name, i in here.tensors.items()
    }
    assert online["opened"]["folder"] == ["LICENSE", "config.json", INDEX, "tokenizer.json"]


def test_opening_reads_headers_by_ranges_and_no_whole_shard(online: dict[str, Any], hub: FakeHub, folder: Path) -> None:
    requests = weight_requests(hub, "user/opened")
    assert {r.path.rpartition("/")[2] for r in requests} == set(SHARDS)
    assert all(r.range is not None and r.status == 206 for r in requests)
    assert all(r.sent < (folder / "sharded" / SHARDS[0]).stat().st_size / 4 for r in requests)
    assert online["opened"]["local_shards"] == []


def test_a_plan_fetches_no_shard_and_counts_the_download(online: dict[str, Any], hub: FakeHub, folder: Path) -> None:
    found = online["planned"]["estimate"]
    assert online["planned"]["local_shards"] == []
    assert all(r.range is not None for r in weight_requests(hub, "user/planned"))
    weights = open_source(folder / "llama").weight_bytes
    assert found["disk"]["download into the Hub's cache"] == weights == found["source_bytes"]
    assert found["revision"] == commit_of("user/planned")
    assert found["problems"] == []


def test_header_is_read_without_the_rest_where_ranges_are_ignored(online: dict[str, Any], hub: FakeHub) -> None:
    assert online["rangeless"] == {"w": [2**26]}
    (request,) = weight_requests(hub, "user/rangeless")
    assert request.status == 200
    assert request.sent < 2**25


def test_token_goes_to_the_hub_but_not_to_the_host_of_the_weights(online: dict[str, Any], hub: FakeHub) -> None:
    requests = hub.requests("user/read")
    assert all(r.authorized == (not r.path.startswith("/cdn/")) for r in requests)


def test_tensors_read_back_bit_for_bit(online: dict[str, Any], folder: Path) -> None:
    here = open_source(folder / "sharded")
    assert online["read"]["tensors"] == {name: digest(here.read(name)) for name in here.tensors}


def test_reading_fetches_each_shard_once_and_not_before_it_is_needed(online: dict[str, Any], hub: FakeHub) -> None:
    assert online["read"]["after_first"] == [SHARDS[0]]
    whole = [r.path.rpartition("/")[2] for r in weight_requests(hub, "user/read") if r.range is None]
    assert sorted(whole) == sorted(SHARDS)


def test_prefetch_fetches_the_named_shard_in_the_background(online: dict[str, Any], hub: FakeHub) -> None:
    assert online["prefetched"] == [SHARDS[1]]
    whole = [r.path.rpartition("/")[2] for r in weight_requests(hub, "user/prefetched") if r.range is None]
    assert whole == [SHARDS[1]]


def test_a_download_that_failed_is_tried_again_at_the_next_read(
    online: dict[str, Any], hub: FakeHub, folder: Path
) -> None:
    here = open_source(folder / "sharded")
    message, *digests = online["flaky"]["got"]
    assert "503" in message
    assert message.isprintable()
    assert digests == [digest(here.read(name)) for name in online["flaky"]["asked"][1:]]
    whole = [r.path.rpartition("/")[2] for r in weight_requests(hub, "user/flaky") if r.range is None]
    assert whole == [SHARDS[0]] * 2 + [SHARDS[1]] * 2  # the second one failed while it was fetched ahead


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("user/unknown", "user/unknown: no such model on the Hub"),
        ("user/gated", "access is gated"),
        ("revision", "user/opened: no such revision; check --revision"),
        ("user/busy", "429"),
        ("user/broken", "500"),
        ("user/html", "not an answer of a Hub"),
        ("user/silent", "user/silent: the Hub cannot be reached"),
        ("user/foreign", "not in the local cache"),
        ("user/empty-shard", "model.safetensors: header of 0 bytes in a file of 0"),
        ("id", "neither a local folder nor a Hub id"),
    ],
)
def test_failure_is_told_in_one_line(online: dict[str, Any], asked: str, said: str) -> None:
    message = online["errors"][asked]
    assert said in message
    assert "escaped" not in message
    assert message.isprintable()


def test_every_failure_has_its_own_message(online: dict[str, Any]) -> None:
    reasons = [message.partition(": ")[2].partition("; ")[0] for message in online["errors"].values()]
    assert len(set(reasons)) == len(reasons)


def test_model_of_the_hub_is_quantized_like_its_folder(online: dict[str, Any], hub: FakeHub, folder: Path) -> None:
    model = online["report"]["model"]
    pinned = {"id": "user/llama", "revision": commit_of("user/llama")}
    assert model == pinned | {"card": {"license": "mit"}, "remote_code": []}
    quantized = [row for row in online["report"]["tensors"] if row["action"] == "quantized"]
    assert len(quantized) == 21
    assert set(open_source(folder / "out").config) > {"quantization_config"}
    assert (folder / "out" / "tokenizer.json").read_bytes() == (folder / "llama" / "tokenizer.json").read_bytes()
    shards = sorted(path.name for path in (folder / "llama").glob("*.safetensors"))
    whole = [r.path.rpartition("/")[2] for r in weight_requests(hub, "user/llama") if r.range is None]
    assert len(shards) > 2
    assert sorted(whole) == shards


def test_only_the_asked_repositories_are_contacted(online: dict[str, Any], hub: FakeHub) -> None:
    # the last two: the client's own, and --eval-data auto asking whether wikitext2 can be had
    known = [*hub.repos, "user/unknown", "api/agent-harnesses", "datasets/Salesforce/wikitext"]
    assert [r.path for r in hub.log if not any(f"/{repo}" in r.path for repo in known)] == []


def test_a_download_on_its_way_does_not_keep_the_process(hub: FakeHub, folder: Path) -> None:
    # The client itself would wait for an hour.
    assert run_child("stalled", folder, hub.endpoint, HF_HUB_DOWNLOAD_TIMEOUT="3600")["begun"] == 1


def test_offline_opens_what_is_cached_and_refuses_the_rest_without_a_connection(
    online: dict[str, Any], folder: Path
) -> None:
    with fake_hub() as other:
        other.repos = {"user/uncached": folder / "small", "user/read": folder / "sharded"}
        answers = run_child("offline", folder, other.endpoint, HF_HUB_OFFLINE="1")
        assert other.log == []
    assert "user/uncached: not in the local cache" in answers["message"]
    assert answers["message"].isprintable()
    assert answers["revision"] == commit_of("user/read")
    assert answers["tensors"] == online["read"]["tensors"]
    assert answers["gguf"] == online["gguf"]


def test_unreachable_hub_is_told_in_one_line(folder: Path) -> None:
    with fake_hub() as gone:
        endpoint = gone.endpoint
    message = run_child("unreachable", folder, endpoint)["message"]
    assert message.startswith("user/uncached: the Hub cannot be reached")
    assert message.isprintable()


def test_the_token_is_in_nothing_that_is_written_or_said(hub: FakeHub, folder: Path) -> None:
    answers = run_child("secrets", folder, hub.endpoint)
    assert answers["codes"] == {"llama": 0, "gated": 4, "unknown": 4, "broken": 4}
    assert (folder / "secret" / "crashed.partial" / "journal").stat().st_size > 0
    assert any(request.authorized for request in hub.requests("user/llama"))  # it was used
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"job.json", "journal", "report.html", "README.md", "secrets.said"} <= {path.name for path in files}
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    said = (folder / "secrets.said").read_text()
    assert "a bug in block 0" in said
    assert "access is gated" in said
    # What is published names no place on this machine, either.
    for path in (folder / "secret" / "llama").rglob("*"):
        assert str(folder).encode() not in (path.read_bytes() if path.is_file() else b""), path


@pytest.mark.parametrize(
    "secret",
    [
        f"401 for {TOKEN}",
        "no answer from https://user:TheSecret@proxy.example/api",
        "Forbidden for url 'https://cdn.example/x?Expires=1&Signature=TheSecret~_&Key-Pair-Id=K'",
        "https://cdn.example/x?X-Amz-Security-Token=TheSecret&a=1",
    ],
)
def test_secrets_in_the_messages_of_others_are_left_out(secret: str) -> None:
    message = str(SourceError("user/m", f"cannot be fetched ({secret})", remedy="check https://huggingface.co/a?b=c"))
    assert "***" in message
    assert TOKEN not in message
    assert "TheSecret" not in message
    assert "https://huggingface.co/a?b=c" in message


if __name__ == "__main__":
    once(pytest.MonkeyPatch())
    without_pauses()
    _, child, child_folder = sys.argv
    children = {
        "online": child_online,
        "offline": child_offline,
        "secrets": child_secrets,
        "stalled": child_stalled,
        "unreachable": child_unreachable,
    }
    result = children[child](Path(child_folder))
    (Path(child_folder) / f"{child}.json").write_text(json.dumps(result))
