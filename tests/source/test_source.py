"""Checkpoints in local folders: what is opened, read bit for bit, and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, build
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.demo import DEMO
from llmquant.errors import SourceError
from llmquant.source.config import safe_config
from llmquant.source.files import INDEX, SINGLE
from llmquant.source.names import natural_key
from llmquant.source.resolve import open_source

TENSORS: dict[str, Tensor] = {
    "bf16": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "f16": torch.tensor([1e-7, -65504.0, float("nan"), float("inf")], dtype=torch.float16),
    "f32": torch.tensor([[1.1], [-0.0]]),
    "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "i64": torch.tensor(-(2**63)),
    "u8": torch.arange(3, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 5),
}


def write(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: Any = None) -> Path:
    """A checkpoint of `shards`; with an index where there are several or a `weight_map` is given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if weight_map is None and len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write(tmp_path / "one", {SINGLE: {"w": torch.ones(2, 2), "b": torch.zeros(2)}})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    shards = {"model-1.safetensors": {"w": torch.ones(2, 2)}, "model-2.safetensors": {"b": torch.zeros(2)}}
    return write(tmp_path / "two", shards)


def test_single_file_opens_with_its_config_and_all_tensors(one: Path) -> None:
    source = open_source(one)
    assert (source.name, source.revision, source.config) == ("one", None, {"model_type": "llama"})
    assert {name: (i.file, i.dtype, i.shape) for name, i in source.tensors.items()} == {
        "w": (SINGLE, torch.float32, (2, 2)),
        "b": (SINGLE, torch.float32, (2,)),
    }
    assert source.weight_bytes == 24
    assert source.is_local("w")


@pytest.mark.parametrize("n_shards", [1, 3])
def test_tensors_are_read_bit_for_bit_in_their_own_dtype(tmp_path: Path, n_shards: int) -> None:
    names = list(TENSORS)
    shards = {f"model-{i}.safetensors": {n: TENSORS[n] for n in names[i::n_shards]} for i in range(n_shards)}
    if n_shards == 1:
        shards = {SINGLE: TENSORS}
    source = open_source(write(tmp_path / "m", shards))
    assert set(source.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = source.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert bits(read) == bits(tensor)


def test_demo_opens_by_its_name() -> None:
    source = open_source("demo")
    assert (source.name, source.folder) == ("llmquant/demo", DEMO)
    assert source.tensors


def test_folder_below_a_cache_folder_opens_like_any_other(tmp_path: Path, one: Path) -> None:
    snapshot = tmp_path / ".cache" / "huggingface" / "hub" / "models--user--m" / "snapshots" / ("0" * 40)
    shutil.copytree(one, snapshot)
    assert set(open_source(snapshot).tensors) == {"w", "b"}


def test_files_below_the_folders_own_cache_are_not_its_files(one: Path) -> None:
    (one / ".cache").mkdir()
    (one / ".cache" / "tokenizer.json").write_text("{}")
    assert open_source(one).files() == ["config.json", SINGLE]


def test_symlinked_files_open_as_in_the_hubs_cache(tmp_path: Path, one: Path) -> None:
    blobs, linked = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / ("0" * 40)
    shutil.copytree(one, blobs)
    linked.mkdir(parents=True)
    for file in blobs.iterdir():
        (linked / file.name).symlink_to(file)
    assert torch.equal(open_source(linked).read("w"), torch.ones(2, 2))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_folder_is_refused(model: str) -> None:
    assert "no such folder" in refusal(lambda: open_source(model))


@pytest.mark.parametrize("file", [SINGLE, "config.json"])
def test_a_file_of_a_checkpoint_stands_for_it(file: str, one: Path) -> None:
    assert open_source(one / file).folder == one
    assert open_source(one / file).name == "one"


def test_a_file_that_is_no_checkpoint_is_refused(one: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "notes.txt"):
        (one / name).write_text("{}")
        assert f"{name}: is a file; expected a checkpoint folder" in refusal(lambda name=name: open_source(one / name))
    (tmp_path / "x.GGUF").write_text("x")
    assert "is a GGUF file" in refusal(lambda: open_source(tmp_path / "x.GGUF"))
    shutil.copy(one / SINGLE, tmp_path / SINGLE)
    assert "has no config.json beside it" in refusal(lambda: open_source(tmp_path / SINGLE))
    for missing in ("gone.GGUF", "gone/config.json", "gone.safetensors"):
        assert "no such folder or file" in refusal(lambda missing=missing: open_source(missing))
    assert "cannot be read (File name too long)" in refusal(lambda: open_source("x" * 300))


def test_a_folder_of_the_hubs_cache_stands_for_its_repository(tmp_path: Path, one: Path) -> None:
    cache, commit = tmp_path / "hub", "1234" * 10
    repo = cache / "models--user--m"
    shutil.copytree(one, repo / "snapshots" / commit)
    source = open_source(repo)
    assert (source.name, source.revision, source.folder) == ("user/m", commit, repo / "snapshots" / commit)
    shutil.copytree(one, repo / "snapshots" / ("5678" * 10))
    assert "no config.json" in refusal(lambda: open_source(repo))  # which of the two?
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert open_source(repo).revision == commit
    assert open_source(repo, "5678" * 10).revision == "5678" * 10
    (repo / "refs" / "v2").write_text("5678" * 10)
    assert open_source(repo, "v2").revision == "5678" * 10
    assert "holds no revision 'v3'; name the repository, user/m" in refusal(lambda: open_source(repo, "v3"))
    assert "is a cache of the Hub; expected a checkpoint folder or a Hub id; in it: user/m" in refusal(
        lambda: open_source(cache)
    )
    assert f"in it: {tmp_path}/one" in refusal(lambda: open_source(tmp_path))


def test_missing_config_is_refused(one: Path) -> None:
    (one / "config.json").unlink()
    assert "no config.json" in refusal(lambda: open_source(one))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "\udcff"])
def test_broken_config_is_refused(one: Path, content: str) -> None:
    (one / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "config.json" in refusal(lambda: open_source(one))


@pytest.mark.parametrize(
    ("file", "said"),
    [("pytorch_model.bin", "only pickle weights ('pytorch_model.bin')"), ("model.gguf", "no safetensors weights")],
)
def test_folder_without_safetensors_is_refused_and_pickles_named(one: Path, file: str, said: str) -> None:
    (one / SINGLE).rename(one / file)
    assert said in refusal(lambda: open_source(one))


def test_index_that_names_a_missing_file_is_refused(two: Path) -> None:
    (two / "model-2.safetensors").unlink()
    message = refusal(lambda: open_source(two))
    assert "model-2.safetensors" in message
    assert "missing" in message


@pytest.mark.parametrize(
    "file",
    [
        "../one/model.safetensors",
        "a/../../model.safetensors",
        "/etc/model.safetensors",
        "~/model.safetensors",
        "..\\one\\model.safetensors",
        "C:\\model.safetensors",
        "a\0.safetensors",
    ],
)
def test_index_that_leads_outside_is_refused(one: Path, tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "m", {"model-1.safetensors": {"w": torch.ones(1)}}, {"w": file})
    assert "leads out of the checkpoint" in refusal(lambda: open_source(folder))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json", "", 7, None, ["model-1.safetensors"]])
def test_index_that_names_no_safetensors_file_is_refused(tmp_path: Path, file: Any) -> None:
    folder = write(tmp_path / "m", {"model-1.safetensors": {"w": torch.ones(1)}}, {"w": file})
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x05")
    assert "expected a .safetensors file" in refusal(lambda: open_source(folder))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[", "[]"])
def test_index_without_a_weight_map_is_refused(one: Path, index: str) -> None:
    (one / SINGLE).unlink()
    (one / INDEX).write_text(index)
    assert INDEX in refusal(lambda: open_source(one))


def test_control_characters_in_an_index_do_not_reach_the_message(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "m", {"a.safetensors": {"w": torch.ones(1)}}, {"w\x1b[2J\r": "x\r\x1b[2J\u2028.safetensors"}
    )
    assert "missing" in refusal(lambda: open_source(folder))


def test_tensor_that_the_index_does_not_name_is_refused(two: Path) -> None:
    (two / INDEX).write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert set(open_source(two).tensors) == {"w"}, "a shard that the index does not name is no part of it"
    save_file({"w": torch.ones(2, 2), "extra": torch.ones(1)}, two / "model-1.safetensors")
    assert "model-1.safetensors: extra" in refusal(lambda: open_source(two))


def test_tensor_in_another_shard_than_the_index_says_is_refused(two: Path) -> None:
    swapped = {"w": "model-2.safetensors", "b": "model-1.safetensors"}
    (two / INDEX).write_text(json.dumps({"weight_map": swapped}))
    assert "does not name" in refusal(lambda: open_source(two))


def test_tensor_that_its_shard_does_not_hold_is_refused(two: Path) -> None:
    weight_map = {"w": "model-1.safetensors", "b": "model-2.safetensors", "lost": "model-2.safetensors"}
    (two / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "'lost'" in refusal(lambda: open_source(two))


@pytest.mark.parametrize("kept", [0, 5, 8, 30, -1])
def test_truncated_shard_is_refused_when_opened(two: Path, kept: int) -> None:
    shard = two / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert "model-2.safetensors" in refusal(lambda: open_source(two))


def test_shard_that_shrinks_after_opening_is_refused_when_read(two: Path) -> None:
    source = open_source(two)
    shard = two / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "ended early" in refusal(lambda: source.read("b"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_inf_are_refused_by_the_tensors_name(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.ones(3, 4, dtype=dtype)
    bad[1, 2] = value
    source = open_source(write(tmp_path / "m", {SINGLE: {"good": torch.ones(1), "layers.0.bad": bad}}))
    assert "layers.0.bad: 1 NaN or Inf values" in refusal(lambda: source.read_finite("layers.0.bad"))
    assert torch.equal(source.read_finite("good"), torch.ones(1))


def test_integers_are_always_finite(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "m", {SINGLE: {"i": torch.tensor([2**31 - 1], dtype=torch.int32)}}))
    assert source.read_finite("i").tolist() == [2**31 - 1]


def test_safe_config_strips_foreign_code_and_kernels_at_every_depth() -> None:
    unsafe = {
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
        "_attn_implementation": "kernels-community/evil",
        "_attn_implementation_internal": "evil",
        "_experts_implementation": "evil",
    }
    config = unsafe | {
        "hidden_size": 64,
        "text_config": unsafe | {"rope": {"type": "linear"} | unsafe},
        "layers": [unsafe | {"kind": "full"}, 3, [unsafe]],
    }
    before = json.dumps(config)
    assert safe_config(config) == {
        "hidden_size": 64,
        "text_config": {"rope": {"type": "linear"}},
        "layers": [{"kind": "full"}, 3, [{}]],
    }
    assert json.dumps(config) == before


GOES_ALONG = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "qwen.tiktoken", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "params.json"),
    *("generation_config.json", "configuration.json", "modules.json", "config_sentence_transformers.json"),
    *("chat_template.jinja", "chat_template.json", "chat_template_tools.jinja", "1_Pooling/config.json"),
    *("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "license.md", "MODEL_LICENSE", "licenses/THIRD_PARTY.md", "NOTICE", "Notice.txt"),
    "USE_POLICY.md",
]
STAYS_BEHIND = {
    "weights that are not loaded": ["pytorch_model.bin", "model-Q4.gguf", "original/consolidated.00.pth"],
    "code": ["tokenization_evil.py", "modeling_evil.py", "run.sh", "license.py"],
    "a record of the training": ["trainer_state.json", "eval_results.json"],
    "of no use to a loader": [
        "logo.png",
        "notes.txt",
        "original/params.json",
        "onnx/tokenizer.json",
        "original/LICENSE",
        "__init__.py",
    ],
    "9 MB": ["word_counts.json"],
}
WRITTEN_ANEW = ["README.md", ".gitattributes", ".hidden/x.json", "quantize_config.json", "pytorch_model.bin.index.json"]


def test_small_data_goes_along_and_the_rest_is_listed_with_its_reason(one: Path) -> None:
    for file in [*GOES_ALONG, *(file for files in STAYS_BEHIND.values() for file in files), *WRITTEN_ANEW]:
        (one / file).parent.mkdir(parents=True, exist_ok=True)
        (one / file).write_text("{}")
    (one / "word_counts.json").write_text(" " * 9_000_000)
    (one / "linked.json").symlink_to("/etc/hostname")
    source = open_source(one)
    assert source.side_files() == sorted(GOES_ALONG)
    assert source.side_bytes == 2**20 + 2 * len(GOES_ALONG)
    reasons = {file: reason for reason, files in STAYS_BEHIND.items() for file in files}
    assert source.left_behind == reasons | {"linked.json": "a link that leads out of the checkpoint"}


# -- which files are the weights -----------------------------------------------------------------------
def stock(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.state_dict()["model.norm.weight"]


def filled(folder: Path, value: float) -> dict[str, torch.Tensor]:
    """The weights in `folder`, its last norm filled with `value`."""
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    return tensors | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], value)}


def test_a_single_file_is_taken_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    model = build(tmp_path / "m", ARCHITECTURES["llama"], shard="100KB")
    save_file(filled(model, 2.0), model / SINGLE, {"format": "pt"})
    source = open_source(model)
    assert torch.equal(source.read("model.norm.weight"), stock(model))
    assert float(stock(model)[0]) == 2.0
    assert set(source.left_behind.values()) == {"weights that are not loaded"}
    assert len(source.left_behind) == len(list(model.glob("model-*.safetensors")))
    (model / SINGLE).unlink()
    source = open_source(model)
    assert torch.equal(source.read("model.norm.weight"), stock(model))
    assert source.left_behind == {}


def test_the_file_that_the_config_names_is_taken_first(tmp_path: Path) -> None:
    model = build(tmp_path / "m", ARCHITECTURES["llama"])
    save_file(filled(model, 3.0), model / "ema.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "ema.safetensors"}))
    source = open_source(model)
    assert torch.equal(source.read("model.norm.weight"), stock(model))
    assert float(stock(model)[0]) == 3.0
    assert source.left_behind == {SINGLE: "weights that are not loaded"}
    assert "transformers_weights" not in source.safe_config  # the output has other files
    for wrong in ("../x.safetensors", "none.safetensors", "config.json", 3, ["x"]):
        (model / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
        assert "transformers_weights" in refusal(lambda: open_source(model))


def test_shards_without_an_index_are_opened_where_all_are_there(tmp_path: Path) -> None:
    model = build(tmp_path / "m", ARCHITECTURES["llama"], shard="100KB")
    whole = open_source(model).tensors
    (model / INDEX).unlink()
    assert open_source(model).tensors == whole
    shards = sorted(model.glob("*.safetensors"))
    shards[1].unlink()
    message = refusal(lambda: open_source(model))
    assert f"{len(shards) - 1} shards and no {INDEX}; expected all {len(shards)}" in message


def test_weights_under_other_names_and_adapters_are_explained(one: Path) -> None:
    (one / SINGLE).rename(one / "consolidated.safetensors")
    assert "'consolidated.safetensors', where transformers does not look" in refusal(lambda: open_source(one))
    (one / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(lambda: open_source(one))


@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json", "LICENSE"])
def test_a_git_lfs_pointer_is_called_one(one: Path, file: str) -> None:
    (one / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    message = refusal(lambda: open_source(one))
    assert f"{file}: is a git-LFS pointer, not the file itself; fetch it: git lfs pull" in message


def test_natural_key_sorts_layers_by_number() -> None:
    names = ["layers.10.w", "layers.2.w", "embed", "layers.2.b"]
    assert sorted(names, key=natural_key) == ["embed", "layers.2.b", "layers.2.w", "layers.10.w"]
