"""inspect and doctor: what they say is what is in the files, and never a token."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import fake_hub
from fake_publish import publishing_hub
from huggingface_hub import close_session, constants

import llmquant
from llmquant.cli.app import main
from llmquant.errors import SourceError
from llmquant.preflight import doctor
from llmquant.preflight.doctor import diagnose
from llmquant.preflight.inspection import code_statistics, inspect_checkpoint, inspect_layer
from llmquant.quant.grid import QuantScheme
from llmquant.source import hub as hub_module

FLAGS = {"method": "rtn", "eval_data": "none", "group_size": 32, "ignore": ["layers.0"]}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "packed"
    llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS), out)
    return out


def test_kinds_and_sizes_are_those_of_the_files(packed: Path) -> None:
    found = inspect_checkpoint(packed)
    report = json.loads((packed / "report.json").read_text())
    kinds = {(kind["name"], kind["scheme"] is not None): kind for kind in found["kinds"]}
    down = kinds["model.layers.*.mlp.down_proj.weight", True]
    assert (down["count"], down["shape"]) == (2, [64, 96])
    assert down["scheme"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert kinds["model.layers.*.mlp.down_proj.weight", False]["count"] == 1  # layer 0 was ignored
    assert sum(kind["count"] for kind in found["kinds"]) == len(report["tensors"])
    assert sum(kind["bytes"] for kind in found["kinds"]) == found["bytes"]
    assert found["bits_per_weight"] == report["bits_per_weight"]
    assert found["quantized"]


def test_a_dense_checkpoint_is_described_too(tiny_model: Callable[[str], Path]) -> None:
    found = inspect_checkpoint(tiny_model("llama"))
    assert not found["quantized"]
    assert found["bits_per_weight"] == 16
    assert all(kind["scheme"] is None for kind in found["kinds"])
    assert "codes" not in inspect_layer(tiny_model("llama"), "model.norm")


def test_layer_statistics_are_those_of_its_codes(packed: Path) -> None:
    found = inspect_layer(packed, LAYER)
    assert sum(found["codes"]["histogram"].values()) == 64 * 96 == found["values"]["count"]
    assert found["scales"]["count"] == 64 * 3
    assert found["scales"]["min"] > 0
    assert {part["name"].rpartition("_")[2] for part in found["stored"]} == {"packed", "scale", "shape"}
    assert inspect_layer(packed, f"{LAYER}.weight") == found


def test_code_statistics_of_known_codes() -> None:
    scheme = QuantScheme(2, -1)
    even = code_statistics(torch.tensor([[-2, -1, 0, 1]]), scheme)
    assert even == {"histogram": {"-2": 1, "-1": 1, "0": 1, "1": 1}, "at_ends": 0.5, "zero": 0.25, "entropy_bits": 2.0}
    assert code_statistics(torch.zeros(3, 3, dtype=torch.int16), scheme)["entropy_bits"] == 0


def test_unknown_layer_is_named_with_its_neighbour(packed: Path) -> None:
    with pytest.raises(SourceError, match=rf"did you mean {LAYER}.weight\?"):
        inspect_layer(packed, f"{LAYER}x")


def test_commands_print_tables_or_json(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", str(packed)], ["inspect", str(packed), "--layer", LAYER], ["doctor"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        assert ("down_proj" in shown) is (words[0] == "inspect")


def test_doctor_never_says_the_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert main(["doctor"]) == 0
    assert main(["doctor", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "verysecret" not in shown
    assert "token set" in shown
    found: dict[str, Any] = diagnose()
    assert found["hub"]["token"] is True
    assert found["formats"]["compressed-tensors"] == {"opened_by": "compressed-tensors", "installed": True}


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the endpoint of a Hub, which is not offline."""

    def set_endpoint(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    close_session()  # the next one is made without a proxy
    yield set_endpoint
    close_session()


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What doctor says of the Hub, as text and as data."""
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Hub ")]
    assert main(["doctor", "--json"]) == 0
    return line, json.loads(capsys.readouterr().out)


def test_doctor_asks_the_hub_and_says_how_long_it_took(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(doctor, "reach_hub", partial(hub_module.reach_hub, 60.0))  # the machine may be busy
    with fake_hub() as hub:
        at(hub.endpoint)
        line, found = shown(capsys)
        assert len(hub.log) == 2
        assert not any(request.authorized for request in hub.log)
    assert re.search(rf"{hub.endpoint}, online, \d+\.\d s, token set", line)
    assert found["hub"]["answered_seconds"] > 0
    assert (found["hub"]["offline"], found["hub"]["not_reached"]) == (False, None)
    assert not any("reached" in problem for problem in found["problems"])


def test_doctor_says_why_the_hub_is_not_reached(at: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    with fake_hub() as gone:
        endpoint = gone.endpoint
    at(endpoint.replace("://", "://me:TheSecret@"))
    line, found = shown(capsys)
    assert f"{endpoint.rpartition('/')[2]}, not reached: ConnectError: " in line
    assert "online" not in line
    assert "TheSecret" not in line + json.dumps(found)
    assert found["hub"]["answered_seconds"] is None
    assert "ConnectError" in found["hub"]["not_reached"]
    assert any("the Hub cannot be reached" in problem for problem in found["problems"])


def test_doctor_asks_nothing_offline(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_hub() as hub:
        at(hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        line, found = shown(capsys)
        assert hub.log == []
    assert "offline by HF_HUB_OFFLINE, token" in line
    assert (found["hub"]["answered_seconds"], found["hub"]["not_reached"]) == (None, None)


def test_a_hub_that_does_not_answer_and_one_that_is_none_are_not_reached(at: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SourceError, match=r"^Hub: (no answer within 0\.2 s|ReadTimeout: )"):
            hub_module.reach_hub(0.2)
    for attack, said in (((503, ""), "status 503 text/html"), ((200, ""), "status 200 text/html")):
        with publishing_hub() as hub:
            at(hub.endpoint)
            hub.attacks["GET /api/models"] = attack
            with pytest.raises(SourceError, match=f"^Hub: {said}; expected an answer of a Hub"):
                hub_module.reach_hub(60.0)


def test_a_gpu_without_triton_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_devices", lambda: [{"name": "cuda:0", "what": "H100"}])
    for version, named in ((None, True), ("3.6.0", False)):
        monkeypatch.setattr(doctor, "installed", lambda name, version=version: version if name == "triton" else "1")
        assert any("Triton" in problem for problem in diagnose()["problems"]) == named
