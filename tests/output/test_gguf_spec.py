"""The reader's own account of GGUF: its tables against llama.cpp's, and mistakes of a writer that it must find."""

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from broken import repaired
from gguf_files import ARCHITECTURES as TINY
from gguf_files import LLAMA3
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import llmquant
from llmquant.errors import VerifyError
from llmquant.gguf.file import Entry, build_gguf
from llmquant.gguf.model import GGUFModel
from llmquant.output import containers
from llmquant.output.check import verify_folder
from llmquant.output.gguf_spec import ARCHITECTURES, BLOCKS, DEFAULTS, OUTER, ROPE, Expected, Order
from llmquant.output.verify import Place
from llmquant.output.verify_gguf import PermutedPlace, read_gguf

# What llama.cpp also takes for these architectures and transformers' checkpoints do not hold.
NOT_OURS = {
    "llama": {"rope_freqs", "attn_rot_embd", "ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"},
    "qwen2": {"rope_freqs"},
    "qwen3": {"rope_freqs"},
    "gemma2": set(),
    "gemma3": set(),
    "gpt2": set(),
    "phi3": {"rope_factors_long", "rope_factors_short", "attn_q", "attn_k", "attn_v"},
}


# -- the tables ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_are_those_of_llama_cpp(kind: str) -> None:
    """Both ways: each of our names is what its own map gives, and every name that it loads is accounted for."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    architecture = ARCHITECTURES[kind]
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table, order = gguf.get_tensor_name_map(arch, 3), Order(architecture, 4, 2)
    base, stack = ("transformer", "h") if kind in ("gpt2", "gpt-sw3") else ("model", "layers")
    for ours in BLOCKS[architecture].values():
        for leaf in ("weight", "bias"):
            expected = f"{table.get_name(f'{base}.{stack}.2.{ours}')}.{leaf}"
            assert order.stored_name(f"{base}.{stack}.2.{ours}.{leaf}") == expected
            assert order.stored_name(f"{stack}.2.{ours}.{leaf}") == expected  # a checkpoint of the base model
    for theirs, ours in OUTER[architecture].items():
        assert order.stored_name(f"{ours}.weight") == f"{theirs}.weight"
        if (theirs, kind) != ("output", "gemma2"):  # always tied: it has no head
            assert table.get_name(ours) == theirs
    loaded = {gguf.TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in gguf.MODEL_TENSORS[arch]}
    ours_all = {*BLOCKS[architecture], *OUTER[architecture]} - ({"output"} if kind == "gemma2" else set())
    assert loaded - NOT_OURS[architecture] == ours_all
    assert gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight" == ROPE == order.stored_name(ROPE)
    for unknown in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.mlp.router.weight", "x.weight"):
        assert order.stored_name(unknown) is None


def test_keys_of_the_metadata_are_those_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    groups = (gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    keys = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    for kind, architecture in ARCHITECTURES.items():
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        expected = Expected("f", {"model_type": kind, "rope_parameters": rope}).metadata
        assert expected.keys() <= {key.replace("{arch}", architecture) for key in keys}
        assert expected[gguf.Keys.General.ARCHITECTURE] == architecture
    assert gguf.Keys.LLM.VOCAB_SIZE == "{arch}.vocab_size"
    types = {(4, True): "MOSTLY_Q4_0", (4, False): "MOSTLY_Q4_1", (8, True): "MOSTLY_Q8_0"}
    from llmquant.output import verify_gguf

    assert {scheme: gguf.LlamaFileType[name].value for scheme, name in types.items()} == verify_gguf._FILE_TYPES
    for number, (_, weights, size) in verify_gguf._TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (weights, size)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("extra", [{}, {"use_sliding_window": True}, {"head_dim": None}, {"num_key_value_heads": None}])
def test_what_a_config_leaves_out_is_what_transformers_assumes(kind: str, extra: dict[str, Any]) -> None:
    """By all that is expected of a bare config.json and of the one that transformers makes of it."""
    if kind in ("gemma2", "gemma3_text", "qwen3") and "head_dim" in extra:
        extra = {"head_dim": 64}  # its class takes no None
    if kind in ("mistral", "gemma2", "gemma3_text") and "num_key_value_heads" in extra:
        extra = {"num_key_value_heads": 2}
    whole = AutoConfig.for_model(kind, **extra).to_dict()
    mine, theirs = Expected("f", {"model_type": kind} | extra), Expected("f", whole)
    assert (mine.metadata, mine.tensors(), mine.order) == (theirs.metadata, theirs.tensors(), theirs.order)
    for key, value in DEFAULTS[kind].items():
        if key not in ("rope_theta", "sliding_window"):
            assert AutoConfig.for_model(kind).to_dict()[key] == value


def test_factors_of_rope_are_those_by_which_transformers_divides() -> None:
    shape = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 512}
    plain, scaled = (AutoConfig.for_model("llama", **shape, rope_parameters=rope) for rope in (None, dict(LLAMA3)))
    plain.rope_parameters["rope_theta"] = LLAMA3["rope_theta"]
    frequencies = LLAMA3["rope_theta"] ** -(torch.arange(0, 128, 2).double() / 128)  # type: ignore[operator]
    theirs = frequencies / ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].double()
    found = Expected("f", scaled.to_dict()).rope_factors
    assert found is not None
    assert len({round(float(factor), 3) for factor in found}) > 3  # short, long, and between
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)
    assert Expected("f", plain.to_dict()).rope_factors is None


def test_rows_of_a_head_are_put_back(tmp_path: Path) -> None:
    """Two heads of 6 rows: llama.cpp has the pairs (0, 3), (1, 4), (2, 5) beside each other."""
    (tmp_path / "f").write_bytes(bytes([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]))
    assert PermutedPlace(tmp_path / "f", "U8", (12, 1), 0, 2).raw().tolist() == list(range(12))


def test_only_llama_and_mistral_have_other_rows() -> None:
    for kind, architecture in ARCHITECTURES.items():
        order = Order(architecture, 4, 2)
        heads = [order.heads_of(f"model.layers.0.self_attn.{leaf}_proj.weight") for leaf in ("q", "k", "v", "o", "qkv")]
        assert heads == ([4, 2] if kind in ("llama", "mistral") else [None, None]) + [None] * 3
    assert Order("llama", 4, 2).heads_of("model.layers.0.self_attn.k_proj.bias") == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "olmo2"}, "model type 'olmo2'; expected llama or mistral"),
        ({"model_type": "llama", "num_attention_heads": "x"}, "cannot be read .ValueError"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be read .ZeroDivisionError"),
        ({"model_type": "llama", "rope_scaling": [1]}, "cannot be read .TypeError"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, "cannot be read .KeyError: 'factor'"),
        ({"model_type": "mistral", "sliding_window": {}, "max_position_embeddings": []}, "cannot be read .TypeError"),
    ],
)
def test_a_config_that_says_nothing_of_use_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=f"^f: .*{message}"):
        Expected("f", config)


# -- mistakes of a writer ------------------------------------------------------------------------------
def run(tmp_path: Path, name: str = "llama", **extra: Any) -> tuple[Path, Path]:
    architectures = tiny.ARCHITECTURES | {"gpt2": tiny.GPT2_ARCHITECTURE}
    source = tiny.build(tmp_path / "m", architectures[name], **TINY.get(name, {}) | extra)
    flags = {"group_size": 32, "method": "rtn", "eval_data": "none", "format": "gguf"}
    if name == "gpt2":  # a square matrix in 16 bit
        flags["ignore"] = [r"attn\.c_proj"]
    llmquant.quantize(source, llmquant.make_recipe("x", flags=flags), tmp_path / "out")
    return source, tmp_path / "out"


def told(**entries: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """A writer that says this of the model."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = GGUFModel.metadata

        def wrong(self: GGUFModel, *args: Any) -> dict[str, Any]:
            found = right(self, *args)
            for key, value in entries.items():
                name = f"{self.architecture}.{key.replace('__', '.')}"
                assert repr(found.get(name)) != repr(value)
                found[name] = value
                if value is None:
                    del found[name]
            return found

        monkeypatch.setattr(GGUFModel, "metadata", wrong)

    return patch


def heads(key: str, config: dict[str, Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A writer that is consistently wrong: in its metadata and in the order of rows."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        told(**{f"attention__{key}": config["num_key_value_heads"]})(monkeypatch)
        right = GGUFModel.rows

        def wrong(self: GGUFModel, key: str, tensor: Tensor) -> Tensor:
            return right(replace(self, config=self.config | config), key, tensor)

        monkeypatch.setattr(GGUFModel, "rows", wrong)

    return patch


def named(one: str, other: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A writer that takes two tensors of equal shape for each other."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = GGUFModel.name
        swap = {one: other, other: one}

        def wrong(self: GGUFModel, key: str) -> str:
            head, _, leaf = right(self, key).rpartition(".")
            front, _, name = head.rpartition(".")
            return f"{front}.{swap.get(name, name)}.{leaf}".lstrip(".")

        monkeypatch.setattr(GGUFModel, "name", wrong)

    return patch


def method(name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(GGUFModel, name)
        monkeypatch.setattr(GGUFModel, name, lambda self, *args: wrong(right(self, *args), self, *args))

    return patch


def other_rows(found: Tensor, model: GGUFModel, key: str, tensor: Tensor) -> Tensor:
    """As if every tensor of q and k had one head more or less: (pair, half) of the whole matrix."""
    if "q_proj" not in key and "k_proj" not in key:
        return found
    return tensor.reshape(2, tensor.shape[0] // 2, -1).transpose(0, 1).reshape(tensor.shape).contiguous()


DECODES = r"does not decode to what was computed|bytes on disk do not decode"
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
MISTAKES: dict[str, tuple[str, dict[str, Any], Callable[[pytest.MonkeyPatch], None], str]] = {
    "rows as in the checkpoint": ("llama", {}, method("rows", lambda found, self, key, t: t), DECODES),
    "rows of other heads": ("llama", {}, method("rows", other_rows), DECODES),
    "rows of Mistral": ("mistral", {}, method("rows", lambda found, self, key, t: t), DECODES),
    "rows of Qwen": ("qwen2", {}, method("rows", other_rows), DECODES),
    "k and v exchanged": ("llama", {}, named("attn_k", "attn_v"), DECODES),
    "gate and up exchanged": ("qwen3", {}, named("ffn_gate", "ffn_up"), DECODES),
    "norms exchanged": ("gemma2", {}, named("ffn_norm", "post_ffw_norm"), DECODES),
    "norms of heads exchanged": ("qwen3", {}, named("attn_q_norm", "attn_k_norm"), DECODES),
    "a name that llama.cpp does not load": ("phi3", {}, named("ffn_down", "ffn_gate"), r"ffn_down\.weight: is missing"),
    "norms without their 1": (
        "gemma2",
        {},
        method("dense", lambda f, self, key, t: t.float() if t.dim() == 1 else f),
        DECODES,
    ),
    "norms with a 1 too many": ("llama", {}, method("dense", lambda f, self, key, t: f + (t.dim() == 1)), DECODES),
    "heads": ("llama", {}, told(attention__head_count=8), r"attention\.head_count: 8; expected 4, by config\.json"),
    "heads of keys": (
        "llama",
        {},
        heads("head_count_kv", {"num_key_value_heads": 4}),
        r"attention\.head_count_kv: 4; expected 2",
    ),
    "no heads of keys": ("qwen2", {}, told(attention__head_count_kv=None), r"head_count_kv: None; expected 2"),
    "norm epsilon": ("llama", {}, told(attention__layer_norm_rms_epsilon=1e-5), r"rms_epsilon: 1e-05; expected 1e-06"),
    "rope base": ("qwen2", {}, told(rope__freq_base=1e6), r"freq_base: 1e\+06; expected 10000\.0"),
    "rope factor": ("llama", LINEAR, told(rope__scaling__factor=4.0), r"scaling\.factor: 4\.0; expected 2\.0"),
    "a rope factor that nobody asked for": (
        "llama",
        {},
        told(rope__scaling__factor=4.0),
        r"scaling\.factor: 4\.0; expected None",
    ),
    "rope dimensions": ("phi3", {}, told(rope__dimension_count=8), r"dimension_count: 8; expected 16"),
    "rope factors of Llama 3": (
        "llama",
        {"rope_parameters": LLAMA3},
        method("rope_factors", lambda found, self: found * 1.01),
        r"rope_freqs\.weight: other factors",
    ),
    "a window": ("gemma2", {}, told(attention__sliding_window=4096), r"sliding_window: 4096; expected 16"),
    "a context past the window": ("mistral", {}, told(context_length=512), r"context_length: 512; expected 128"),
    "Conv1D layers as they lie": (
        "gpt2",
        {},
        method("dense", lambda f, self, key, t: t if t.dim() > 1 else f),
        DECODES,
    ),
    "norms of GPT-2 exchanged": ("gpt2", {}, named("attn_norm", "ffn_norm"), DECODES),
    "norm epsilon of GPT-2": (
        "gpt2",
        {},
        told(attention__layer_norm_epsilon=1e-6),
        r"layer_norm_epsilon: 1e-06; expected 1e-05",
    ),
    "a number as a float": ("llama", {}, told(block_count=3.0), r"block_count: 3\.0; expected 3"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_of_the_writer_is_caught(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, extra, patch, message = MISTAKES[what]
    patch(monkeypatch)
    with pytest.raises(VerifyError, match=message):
        run(tmp_path, name, **extra)
    assert not (tmp_path / "out").exists()


def test_the_header_on_the_disk_is_checked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = build_gguf

    def wrong(file: str, metadata: dict[str, Any], entries: list[Entry]) -> Any:
        return right(file, metadata | {"general.file_type": 7}, entries)

    monkeypatch.setattr(containers, "build_gguf", wrong)
    with pytest.raises(VerifyError, match=r"general\.file_type: 7; expected 2"):
        run(tmp_path)


def test_a_header_that_was_changed_later_is_caught_with_the_original(tmp_path: Path) -> None:
    """A manifest that fits: of heads the weights tell, of all else the original's config.json."""
    source, out = run(tmp_path, rms_norm_eps=1e-5)
    verify_folder(out, source)
    (file,) = out.glob("*.gguf")
    whole = file.read_bytes()

    def changed(key: str, new: bytes) -> None:
        at = whole.index(key.encode()) + len(key) + 4
        assert whole[at : at + 4] != new
        file.write_bytes(whole[:at] + new + whole[at + 4 :])
        repaired(out)

    changed("llama.attention.head_count_kv", struct.pack("<I", 4))
    with pytest.raises(VerifyError, match=r"k_proj\.weight: does not decode to what was computed"):
        verify_folder(out)
    for key, new in (
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", 1e-6)),
        ("llama.rope.freq_base", struct.pack("<f", math.nan)),
        ("llama.context_length", struct.pack("<I", 256)),
        ("general.file_type", struct.pack("<I", 7)),
    ):
        changed(key, new)
        verify_folder(out)
        with pytest.raises(VerifyError, match=key.replace(".", r"\.")):
            verify_folder(out, source)
    changed("llama.attention.head_count", struct.pack("<I", 0))
    with pytest.raises(VerifyError, match="architecture 'llama', 0 and 2 heads"):
        verify_folder(out)


# -- the container -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("metadata", "entry", "message"),
    [
        ({}, Entry("t", "Q4_0", (1, 33), (torch.uint8, (1, 18))), r"t: sizes \[1, 33\]; expected rows of whole blocks"),
        ({}, Entry("t", "F32", (), (torch.float32, (1,))), r"t: sizes \[\]"),
        ({"general.alignment": 64}, Entry("t", "F32", (2,), (torch.float32, (2,))), "an alignment of 64"),
    ],
)
def test_what_readers_would_read_otherwise_is_refused(
    metadata: dict[str, Any], entry: Entry, message: str, tmp_path: Path
) -> None:
    head, places = build_gguf("f", metadata, [entry])
    (tmp_path / "f").write_bytes(head + bytes(places["t"].end - places["t"].start))
    with pytest.raises(VerifyError, match=message):
        read_gguf(tmp_path / "f")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    head, _ = build_gguf("f", {"a.b": 1, "a.c": 2}, [])
    (tmp_path / "f").write_bytes(head)
    assert read_gguf(tmp_path / "f") == ({"a.b": 1, "a.c": 2}, dict[str, Place]())
    (tmp_path / "f").write_bytes(head.replace(b"a.c", b"a.b"))
    with pytest.raises(VerifyError, match=r"a\.b is there twice"):
        read_gguf(tmp_path / "f")
