"""Checkpoints made to harm: nothing of theirs is executed, opened outside their folder, or allocated on their word."""

import json
import os
import pickle
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from llmquant.cli.app import main
from llmquant.errors import LLMQuantError, SourceError
from llmquant.model.skeleton import Skeleton
from llmquant.source.bounds import refuse_absurd
from llmquant.source.files import INDEX, SINGLE
from llmquant.source.header import MAX_HEADER_BYTES, parse_header
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    table = json.loads((folder / file).read_text())
    change(table)
    (folder / file).write_text(json.dumps(table))


def refusal(call: Callable[[], object]) -> str:
    """The one line with which `call` is refused, in little time and memory."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LLMQuantError) as caught:
        call()
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def build(folder: Path) -> Skeleton:
    return Skeleton(open_source(folder), CPU, torch.float32)


# -- code ----------------------------------------------------------------------------------------------
class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
@pytest.mark.parametrize("beside", ["nothing", "an index that names it"])
def test_a_pickle_is_never_loaded_and_is_named(model: Path, tmp_path: Path, file: str, beside: str) -> None:
    sung = tmp_path / "sung"
    (model / SINGLE).unlink()
    (model / file).write_bytes(pickle.dumps(Canary(sung)))
    if beside != "nothing":
        (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    message = refusal(lambda: open_source(model))
    assert file in message
    assert main(["run", "--model", str(model), "--out", str(tmp_path / "out")]) == 4
    assert not sung.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((model / file).read_bytes())  # it would have sung
    assert sung.is_dir()


def with_code(folder: Path, sung: Path) -> None:
    """Python files of a model and a tokenizer that make a folder when they are imported."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"import os\nos.makedirs({str(sung)!r})\nEvil = None\n")


CODE = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}
UNSAFE = {"auto_map": CODE, "trust_remote_code": True, "attn_implementation": "evil/kernel", "use_kernels": True}


def test_code_beside_a_known_model_is_not_run_and_its_name_is_not_passed_on(model: Path, tmp_path: Path) -> None:
    sung, out = tmp_path / "sung", tmp_path / "out"
    with_code(model, sung)
    edit(model, lambda config: config.update(UNSAFE, rope_parameters={**config["rope_parameters"], **UNSAFE}))
    options = ["--method", "rtn", "--eval-data", "none", "--group-size", "32"]
    assert main(["run", "--model", str(model), "--out", str(out), *options]) == 0
    assert not sung.exists()
    assert not list(out.glob("*.py"))
    said = (out / "config.json").read_text()
    assert not [word for word in ("auto_map", "evil", "trust_remote_code", "use_kernels") if word in said]


def test_a_model_that_is_code_only_is_refused(model: Path, tmp_path: Path) -> None:
    with_code(model, tmp_path / "sung")
    edit(model, lambda config: config.update(UNSAFE, model_type="evil"))
    assert "remote code is not run" in refusal(lambda: build(model))
    assert not (tmp_path / "sung").exists()


def test_code_of_a_tokenizer_is_not_run(model: Path, tmp_path: Path) -> None:
    with_code(model, tmp_path / "sung")
    tokenizer = {"auto_map": {"AutoTokenizer": CODE["AutoTokenizer"]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    edit(model, lambda config: config.update(UNSAFE))
    assert "its tokenizer is code of its own, which is not run" in refusal(lambda: load_tokenizer(open_source(model)))
    assert not (tmp_path / "sung").exists()
    assert not [name for name in sys.modules if "_evil" in name]


def test_a_kernel_of_the_hub_is_not_chosen_by_a_config(model: Path) -> None:
    edit(model, lambda config: config.update(attn_implementation="evil/kernel", experts_implementation="evil/kernel"))
    assert build(model).model.config._attn_implementation in ("sdpa", "eager")


# -- configs that lie ----------------------------------------------------------------------------------
BILLION = 10**9


@pytest.mark.parametrize("value", [BILLION, 10**30, 1e300, -1, 0, -BILLION, "64", "wide", [64], {"a": 1}, None, 2.5])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "head_dim",
    ],
)
def test_an_absurd_size_is_refused(model: Path, key: str, value: Any) -> None:
    edit(model, lambda config: config.update({key: value}))
    if (key, value) in (("head_dim", None), ("num_key_value_heads", None)):  # mean the default
        assert build(model).blocks if key == "head_dim" else refusal(lambda: build(model))
    else:
        refusal(lambda: build(model))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(text_config=dict(c, num_hidden_layers=BILLION)),
        lambda c: c.update(text_config={"text_config": {"head_dim": BILLION}}),
        lambda c: c.update(vision_config={"num_experts": BILLION}),
        lambda c: c.update(rms_norm_eps=float("nan")),
        lambda c: c.update(rope_parameters={"rope_theta": float("inf"), "rope_type": "default"}),
        lambda c: c.update(layers=[{"hidden_size": BILLION}]),
    ],
    ids=["text_config", "two levels", "vision_config", "NaN", "infinity", "a list"],
)
def test_absurd_values_are_refused_at_every_level(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(model, change)
    message = refusal(lambda: build(model))
    assert "config.json: " in message


@pytest.mark.parametrize("depth", [40, 300, 900, 10**5])
def test_a_config_of_many_levels_is_refused(model: Path, depth: int) -> None:
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ',"a":' + '{"a":' * depth + "0" + "}" * depth + "}")
    assert "config.json" in refusal(lambda: build(model))


def test_a_mask_for_a_long_context_is_not_allocated(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "gptj", tiny.ARCHITECTURES["gptj"])
    edit(folder, lambda config: config.update(n_positions=10**8, max_position_embeddings=10**8))
    assert "bytes of buffers" in refusal(lambda: build(folder))


def made_of(model_type: str) -> Any:
    """Something like a Source: the default config of a model class, and the shapes of that model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return SimpleNamespace(name=model_type, tensors=state, config=json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "gptj", "opt", "falcon", "phi3", "mamba"])
def test_configs_of_real_models_are_not_absurd(model_type: str) -> None:
    source = made_of(model_type)
    refuse_absurd(source, source.config)


@pytest.mark.soak
def test_no_default_config_of_transformers_is_absurd() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    passed, refused = 0, []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            source = made_of(model_type)
        except Exception as error:  # some have no default, or need a package that is not there
            print(f"{model_type}: {type(error).__name__}")
            continue
        try:
            refuse_absurd(source, source.config)
            passed += 1
        except SourceError as error:
            refused.append(str(error))
    print(f"{passed} default configs")
    assert not refused
    assert passed > 100


def test_a_config_or_index_that_is_too_long_is_not_read(model: Path) -> None:
    (model / SINGLE).unlink()
    for file in ("config.json", INDEX):
        with (model / file).open("wb") as stream:
            stream.truncate(2**40)  # a hole
        assert f"at most {MAX_HEADER_BYTES}" in refusal(lambda: open_source(model))
        (model / file).unlink()
        (model / "config.json").write_text('{"model_type": "llama"}')


# -- headers -------------------------------------------------------------------------------------------
def repeated(start: str, part: str, end: str) -> bytes:
    return (start + part * ((MAX_HEADER_BYTES - len(start) - len(end)) // len(part)) + end).encode()


BOMBS: dict[str, Callable[[], bytes]] = {
    "lists": lambda: repeated('{"w":[', "[],", "0]}"),
    "lists in lists": lambda: repeated('{"w":[', "[" * 900 + "]" * 900 + ",", "0]}"),
    "numbers": lambda: repeated('{"w":[', "999,", "0]}"),
    "long numbers": lambda: repeated('{"w":[', "9" * 4000 + ",", "0]}"),
    "texts": lambda: repeated('{"w":[', '"ab",', "0]}"),
    "one text": lambda: repeated('{"w":"', "\\u0041", '"}'),
    "names": lambda: repeated("{", '"a":0,', '"b":0}'),
    "metadata": lambda: repeated('{"__metadata__":{', '"a":"",', '"b":""}}'),
    "brackets": lambda: repeated('{"w":', "[", ""),
    "spaces": lambda: repeated("{", " ", "}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_of_full_length_costs_little_whatever_it_holds(name: str) -> None:
    header = BOMBS[name]()
    if name == "spaces":
        assert parse_header("x", header, 8 + len(header)) == {}
    else:
        refusal(lambda: parse_header("x", header, 8 + len(header)))


# -- paths ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "through a folder"])
def test_a_link_out_of_the_checkpoint_is_not_followed(model: Path, tmp_path: Path, file: str, kind: str) -> None:
    secret = tmp_path / "home" / file
    secret.parent.mkdir()
    secret.write_text("years of work")
    (model / file).unlink(missing_ok=True)
    if kind == "through a folder":
        (model / "up").symlink_to("..")
        (model / file).symlink_to(Path("up") / "home" / file)
    else:
        (model / file).symlink_to(secret if kind == "absolute" else Path("..") / "home" / file)
    message = refusal(lambda: open_source(model))
    assert f"{file}: is a link that leads out of the checkpoint" in message
    assert "years" not in message


def test_links_of_the_hubs_cache_and_inside_the_checkpoint_are_followed(model: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--user--m"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert build(snapshot).blocks
    (model / "real.safetensors").write_bytes((model / SINGLE).read_bytes())
    (model / SINGLE).unlink()
    (model / SINGLE).symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(model)
    assert build(tmp_path / "link").blocks


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling"])
def test_what_is_no_plain_file_is_never_opened(model: Path, kind: str) -> None:
    (model / SINGLE).unlink()
    path = model / "evil.safetensors"
    if kind == "fifo":
        os.mkfifo(path)  # to open it would wait forever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "gone")
    (model / INDEX).write_text(json.dumps({"weight_map": {"w": path.name}}))
    assert "missing" in refusal(lambda: open_source(model))


def test_an_index_and_headers_that_disagree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    for weight_map in ({"a": "1.safetensors", "b": "2.safetensors"}, {"a": "2.safetensors"}, {"b": "1.safetensors"}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SourceError, match=r"does not name|which 1\.safetensors does not hold"):
            open_source(tmp_path)
