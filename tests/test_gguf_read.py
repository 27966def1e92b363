"""GGUF read back: our own files against the checkpoints they were made from, others' against the package gguf."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_gguf import ARCHITECTURES, TEXTS, gguf_of, quantized, splitter, with_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmquant
from llmquant.calibration import load_tokenizer
from llmquant.checkpoint import PackedSource, bits_per_weight, open_checkpoint, open_original
from llmquant.cli import main
from llmquant.errors import CalibrationError, SourceError
from llmquant.export import export
from llmquant.gguf_config import FREQS, LONG, SHORT, Described
from llmquant.gguf_model import GGUFModel
from llmquant.gguf_source import GGUFSource, open_gguf_file
from llmquant.inspection import inspect_checkpoint, inspect_layer
from llmquant.source import DEMO, SINGLE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def few(**flags: Any) -> llmquant.Recipe:
    return llmquant.make_recipe("x", flags={"eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"} | flags)


def built(folder: Path, name: str, **extra: Any) -> Path:
    shape = {"max_position_embeddings": 512, "initializer_range": 0.2}
    return tiny.build(folder, tiny.ARCHITECTURES[name], **shape | ARCHITECTURES[name] | extra)


def stored(file: Path) -> GGUFSource:
    source = open_gguf_file(file)
    assert isinstance(source, GGUFSource)
    return source


# -- our own files -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "extra", "flags"),
    [
        *((name, {}, {}) for name in ARCHITECTURES),
        ("llama", {"rope_parameters": LLAMA3}, {"bits": 8}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, {}),
        ("qwen3", {"attention_bias": True}, {"symmetric": False, "format": "awq"}),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}}, {}),
    ],
)
def test_a_file_is_the_checkpoint_it_was_made_from(
    name: str, extra: dict[str, Any], flags: dict[str, Any], tmp_path: Path
) -> None:
    """Every tensor, everything that llama.cpp is told, and the figures of an evaluation."""
    original = built(tmp_path / "m", name, **extra)
    out = quantized(original, tmp_path / "q", **flags)
    file = gguf_of(out)
    ours, read = open_checkpoint(out), open_checkpoint(file.parent)
    assert isinstance(read, PackedSource)
    exact = flags.get("symmetric", True)
    for key in read.tensors:
        mine, theirs = ours.read(key).float(), read.read(key)
        if name == "gemma2" and "norm" in key:  # what is multiplied with: 1 + w in float32
            mine, theirs = 1 + mine, 1 + theirs
        if exact or key not in read.packed:
            assert torch.equal(mine, theirs.float()), key
        else:  # minima are rounded to fp16
            torch.testing.assert_close(mine, theirs.float(), rtol=0, atol=2e-3 * float(mine.abs().max()))
    left_out = {"lm_head.weight"} if read.config["tie_word_embeddings"] else set()
    assert ours.tensors.keys() - left_out == read.tensors.keys()

    metadata = stored(file).header.metadata
    config = AutoConfig.for_model(**{"model_type": read.config["model_type"], **read.config}).to_dict()
    again = GGUFModel(config).metadata("", 0, 4096)
    assert {k: v for k, v in again.items() if not k.startswith("general.")}.items() <= metadata.items()

    report = llmquant.compare([out, file.parent], reference=original, recipe=few())
    of_ours, of_file = (report.lanes[lane] for lane in ("q", "q-gguf"))
    rel = 1e-12 if exact else 2e-2
    assert of_file["kl_mean"] == pytest.approx(of_ours["kl_mean"], rel=rel) != 0
    assert of_file["bits_per_weight"] == {True: 4.5, False: 5.0}[exact] if not flags.get("bits") else 8.5
    assert of_file["bytes"] == pytest.approx(file.stat().st_size, rel=0.2)


def test_the_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`llmquant eval --model demo-GGUF --reference demo`, for a tiny demo, and what inspect says of it."""
    demo = built(tmp_path / "demo", "llama")
    out = quantized(demo, tmp_path / "demo-GGUF", format="gguf")
    options = ["--data", "builtin", "--tokens", "128", "--seq-len", "64", "--quiet"]
    report = tmp_path / "report.json"
    assert main(["eval", "--model", str(out), "--reference", str(demo), *options, "--json", str(report)]) == 0
    assert "demo-GGUF" in capsys.readouterr().out
    lane = json.loads(report.read_text())["evaluation"]["lanes"]["demo-GGUF"]
    assert 0 < lane["kl_mean"] < 1
    assert lane["bits_per_weight"] == 4.5
    assert main(["inspect", str(out)]) == 0
    assert main(["inspect", str(out), "--layer", "model.layers.0.mlp.up_proj"]) == 0
    said = capsys.readouterr().out
    assert "demo-GGUF: llama" in said
    assert "4.500 bits per weight in the quantized linears" in said
    assert "codes: entropy" in said


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_transformers_unpacks_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package")
    file = gguf_of(quantized(built(tmp_path / "m", name), tmp_path / "q"))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    source = open_checkpoint(file)
    for key in source.tensors:
        assert torch.equal(source.read(key).float(), theirs[key]), key


def test_a_file_of_16_bit_weights_can_be_a_reference(tmp_path: Path) -> None:
    """As llama.cpp's converter writes it, with its tokenizer."""
    table = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    special = {item["id"] for item in table["added_tokens"]}

    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(table["model"]["vocab"], key=table["model"]["vocab"].get))
        writer.add_token_types([3 if index in special else 1 for index in range(4096)])
        writer.add_token_merges([" ".join(merge) for merge in table["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(False)

    original = built(tmp_path / "m", "llama", dtype=torch.float16)
    file = foreign(tmp_path / "f16", original, {}, vocabulary)
    out = quantized(original, tmp_path / "q")
    source = open_checkpoint(file)
    assert not isinstance(source, PackedSource)
    assert bits_per_weight(source) == pytest.approx(16, rel=0.01)
    lanes = [
        llmquant.evaluate(out, reference=reference, recipe=few()).lanes["q"]["kl_mean"]
        for reference in (original, file)
    ]
    assert lanes[0] == pytest.approx(lanes[1], rel=1e-12)


# -- others' files -------------------------------------------------------------------------------------
# Offsets of the fp16 numbers in a block; the other bytes may be anything.
SCALES = {
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ2_XXS": (0,),
}


def random_rows(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Blocks with scales of either sign, uint8 [rows, bytes of a row]."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    dice = np.random.default_rng(seed)
    blocks = dice.integers(0, 256, (shape[0], shape[1] // weights, size), np.uint8)
    small = {"Q8_0": 2e-3, "Q6_K": 1e-4, "Q4_K": 3e-4, "Q5_K": 2e-4}.get(kind, 1e-3)
    for at in SCALES[kind]:
        scale = (dice.uniform(0.5, 1.5, blocks.shape[:2]) * small * dice.choice([-1, 1], blocks.shape[:2])).astype(
            "<f2"
        )
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def foreign(
    folder: Path, original: Path, kinds: dict[str, str], change: Callable[[Any], None] = lambda writer: None
) -> Path:
    """A Llama as llama.cpp's converter writes it, by the gguf package; `kinds`: block types by the file's names.

    Blocks are random: the original's weights are written where no type is named.
    """
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    model = GGUFModel(AutoConfig.from_pretrained(original).to_dict())
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "some-Q4_K_M.gguf", "llama")
    config = model.config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(15)
    change(writer)
    for seed, (key, tensor) in enumerate(load_file(original / SINGLE).items()):
        name = model.name(key)
        if name in kinds:
            rows = random_rows(kinds[name], tuple(tensor.shape), seed)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        else:
            dense = model.rows(key, model.dense(key, tensor))
            writer.add_tensor(name, dense.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "some-Q4_K_M.gguf"


LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MIXED = dict(zip([f"blk.{i}.{leaf}.weight" for i in (0, 1) for leaf in LINEARS], SCALES, strict=True))
MIXED |= {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole super-blocks of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return built(tmp_path_factory.mktemp("wide") / "m", "llama", dtype=torch.float16, **shape)


def test_k_quants_are_what_the_gguf_package_unpacks(wide: Path, tmp_path: Path) -> None:
    """Values by another reader of the file; figures by a dense copy of them."""
    import gguf

    file = foreign(tmp_path / "made-by-others", wide, MIXED)
    source = open_checkpoint(file.parent)
    assert isinstance(source, PackedSource)
    assert source.name == "made-by-others"
    dense: dict[str, Tensor] = {}
    names = {stored(file).names.ours(tensor.name): tensor for tensor in gguf.GGUFReader(file).tensors}
    assert names.keys() == source.tensors.keys() == load_file(wide / SINGLE).keys()
    for key, tensor in names.items():
        assert key is not None
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        for leaf, heads in (("q_proj", 4), ("k_proj", 2)):
            if leaf in key:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(source.read(key).float().numpy(), values), key
        assert np.isfinite(values).all()
        dense[key] = torch.from_numpy(np.array(values, np.float32))
    copy = tmp_path / "copy"
    copy.mkdir()
    save_file(dense, copy / SINGLE, {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((wide / name).read_bytes())
    lanes = llmquant.compare([file.parent, copy], reference=wide, recipe=few()).lanes
    assert lanes["made-by-others"]["kl_mean"] == lanes["copy"]["kl_mean"] > 0
    n_weights = {key: info.numel for key, info in source.tensors.items() if key in source.packed}
    n_bytes = sum(tensor.n_bytes for key, tensor in names.items() if key in source.packed)
    assert source.bits_per_weight == 8 * n_bytes / sum(n_weights.values())

    rows = {kind["form"]: kind for kind in inspect_checkpoint(file)["kinds"]}
    bits = {"Q4_K": 4.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q3_K": 3.4375, "Q2_K": 2.625, "Q5_0": 5.5, "Q4_1": 5.0}
    assert {kind: rows[kind]["bits_per_weight"] for kind in bits} == bits


def test_inspect_looks_into_a_layer(wide: Path, tmp_path: Path) -> None:
    file = foreign(tmp_path / "f", wide, {"blk.0.ffn_up.weight": "Q8_0", "blk.0.ffn_down.weight": "Q4_K"})
    up = inspect_layer(file, "model.layers.0.mlp.up_proj")
    assert up["scheme"] == {"bits": 8, "group_size": 32, "symmetric": True}
    assert sum(up["codes"]["histogram"].values()) == 512 * 256
    assert up["scales"]["count"] == 512 * 256 / 32
    down = inspect_layer(file, "model.layers.0.mlp.down_proj")
    assert (down["form"], down["scheme"], down["values"]["nonfinite"]) == ("Q4_K", None, 0)


def test_without_the_gguf_package_its_install_command_is_named(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"blk.0.ffn_up.weight": "Q4_0", "blk.0.ffn_down.weight": "Q4_K"}
    source = open_checkpoint(foreign(tmp_path / "f", wide, kinds))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    source.read("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(SourceError, match=r"down_proj\.weight: is stored as Q4_K.*; pip install gguf$"):
        source.read("model.layers.0.mlp.down_proj.weight")


# -- config.json beside the file, and what is refused --------------------------------------------------
def beside(file: Path, **config: Any) -> Path:
    (file.parent / "config.json").write_text(json.dumps(config))
    return file


def test_a_config_beside_the_file_says_what_the_metadata_cannot(wide: Path, tmp_path: Path) -> None:
    def yarn(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_float32("llama.some_new_scale", 0.5)

    file = foreign(tmp_path / "f", wide, {}, yarn)
    with pytest.raises(SourceError, match=r"llama\.some_new_scale: 0\.5; expected keys .*config\.json beside"):
        open_checkpoint(file)
    whole = json.loads((wide / "config.json").read_text())
    assert open_checkpoint(beside(file, **whole)).config["rope_parameters"] == whole["rope_parameters"]
    with pytest.raises(
        SourceError, match=r"config\.json: hidden_size 128; expected 256.*; it belongs to another model"
    ):
        open_checkpoint(beside(file, **whole | {"hidden_size": 128}))
    with pytest.raises(SourceError, match=r"config\.json: model type 'qwen2'; expected one of llama"):
        open_checkpoint(beside(file, **whole | {"model_type": "qwen2"}))
    with pytest.raises(SourceError, match=r"rope_freqs\.weight: is missing; expected those of rope type 'llama3'"):
        open_checkpoint(beside(file, **whole | {"rope_parameters": LLAMA3}))
    plain = foreign(tmp_path / "g", wide, {})
    expected = open_checkpoint(plain).config
    # Uploads hold such stubs: the defaults of the class are not those of the model.
    found = open_checkpoint(beside(plain, model_type="llama", quantization_config={"quant_method": "gptq"})).config
    assert found == expected


def test_factors_of_rope_that_nobody_names_are_refused(wide: Path, tmp_path: Path) -> None:
    def factors(values: list[float]) -> Callable[[Any], None]:
        return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))

    ones = open_checkpoint(foreign(tmp_path / "a", wide, {}, factors([1.0] * 32)))
    assert ones.config["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(SourceError, match=r"rope_freqs\.weight: divides the frequencies"):
        open_checkpoint(foreign(tmp_path / "b", wide, {}, factors([1.0] * 16 + [2.0, 3.0] * 8)))


@pytest.mark.parametrize("rope", [{"rope_theta": 500000.0, "factor": 8.0}, {"rope_theta": 500000.0, "factor": 32.0}])
def test_the_rope_of_llama_3_is_found_from_its_factors(rope: dict[str, float]) -> None:
    """Llama 3.1 and 3.2: heads of 128 and of 64."""
    wanted = LLAMA3 | rope | {"original_max_position_embeddings": 8192}
    size = 128 if rope["factor"] == 8 else 64
    config = {"model_type": "llama", "hidden_size": 4 * size, "num_attention_heads": 4, "hidden_act": "silu"}
    metadata = GGUFModel(
        config
        | {"num_hidden_layers": 1, "intermediate_size": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
        | {"rope_parameters": wanted}
    )
    described = Described("f", metadata.metadata("", 0, 8), {"token_embd.weight": (8, 4 * size)})
    factors = metadata.rope_factors()
    assert factors is not None
    assert described.config({}, {FREQS: factors})["rope_parameters"] == wanted


def test_the_factors_of_phi_3_are_its_longrope() -> None:
    """Phi-4-mini: partial rotation, the factor of attention in the metadata. transformers' own rope is the judge."""
    short, long = ([1.0 + scale * i for i in range(6)] for scale in (0.05, 0.5))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    shape = tiny.COMMON | tiny.LLAMA | {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
    original = AutoConfig.for_model("phi3", **shape, rope_parameters=dict(rope))
    plain = AutoConfig.for_model("phi3", **shape, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75})
    metadata = GGUFModel(plain.to_dict()).metadata("", 0, 4096)
    metadata["phi3.rope.scaling.attn_factor"] = (1 + math.log(8) / math.log(64)) ** 0.5
    factors = {LONG: torch.tensor(long), SHORT: torch.tensor(short)}
    described = Described("f", metadata, {"token_embd.weight": (4096, 64), LONG: (6,), SHORT: (6,)})
    config = described.config({}, factors)
    assert described.config(original.to_dict(), factors)["rope_parameters"] == original.rope_parameters
    ours, theirs = (
        AutoModelForCausalLM.from_config(c).model.rotary_emb for c in (AutoConfig.for_model(**config), original)
    )
    assert type(ours) is type(theirs)
    for length in (8, 100):
        ids = torch.arange(length)[None]
        for mine, other in zip(ours(torch.ones(1), ids), theirs(torch.ones(1), ids), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(SourceError, match=r"rope_factors_long\.weight: divides the frequencies.*'default'"):
        described.config(plain.to_dict(), factors)
    with pytest.raises(SourceError, match=r"config\.json: rope of type 'longrope' \(a base of 20000\.0, 10000\.0 by"):
        described.config(original.to_dict() | {"rope_parameters": rope | {"rope_theta": 2e4}}, factors)


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({key: value})


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (edit("general.architecture", "mamba"), "architecture 'mamba'; expected llama, qwen2, qwen3, gemma2, phi3$"),
    (lambda m: m.pop("general.architecture"), "architecture 'None'"),
    (lambda m: m.pop("llama.block_count"), "llama.block_count: None; expected a number above 0"),
    (edit("llama.attention.head_count", [4, 8]), r"llama.attention.head_count: \[4, 8\]"),
    (edit("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type: yarn; expected none or linear"),
    (edit("llama.expert_count", 8), "llama.expert_count: 8"),
    (edit("llama.attention.sliding_window", 8), "llama.attention.sliding_window: 8"),
    (edit("llama.rope.dimension_count", 32), "llama.rope.dimension_count: 32; expected 64"),
    (edit("llama.attention.layer_norm_rms_epsilon", float("nan")), "rms_epsilon: nan"),
    (edit("llama.attention.value_length", 8), "llama.attention.value_length: 8"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_model_that_is_not_known_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, wide: Path, tmp_path: Path
) -> None:
    header = stored(foreign(tmp_path / "f", wide, {})).header
    metadata, shapes = dict(header.metadata), {name: tensor.shape for name, tensor in header.tensors.items()}
    change(metadata)
    with pytest.raises(SourceError, match=message):
        Described("f", metadata, shapes).config({}, {})


def test_what_is_no_single_model_is_refused(wide: Path, tmp_path: Path) -> None:
    file = foreign(tmp_path / "f", wide, {"blk.0.ffn_up.weight": "Q4_K"})
    with pytest.raises(
        SourceError, match=r"is a file; expected a checkpoint folder.*name the checkpoint that it was made"
    ):
        open_original(file)
    with pytest.raises(SourceError, match=r"holds 'some-Q4_K_M\.gguf' and no safetensors weights.*was made from"):
        open_original(file.parent)
    with pytest.raises(SourceError, match="is a GGUF file; expected safetensors"):
        export(file, "awq", tmp_path / "out")
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(SourceError, match=r"holds 2 GGUF files \(other\.gguf, some-Q4_K_M\.gguf\); expected one"):
        open_checkpoint(file.parent)
    (file.parent / SINGLE).write_bytes((wide / SINGLE).read_bytes())
    with pytest.raises(SourceError, match=r"no config\.json"):  # it is a checkpoint of safetensors now
        open_checkpoint(file.parent)
    part = foreign(tmp_path / "part", wide, {}, lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(SourceError, match="is one of 3 parts; join them"):
        open_checkpoint(part)
    extra = foreign(
        tmp_path / "e", wide, {}, lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 256), "f"))
    )
    with pytest.raises(SourceError, match=r"'blk\.0\.ffn_gate_inp\.weight': is no tensor of llama"):
        open_checkpoint(extra)


def test_a_window_longer_than_a_files_context_is_refused(tmp_path: Path) -> None:
    original = built(tmp_path / "m", "mistral", sliding_window=32)
    file = gguf_of(quantized(original, tmp_path / "q"))
    with pytest.raises(SourceError, match=r"context 32; expected at least the 64 tokens of a window; --seq-len 32"):
        llmquant.evaluate(file, reference=original, recipe=few())
    assert llmquant.evaluate(file, reference=original, recipe=few(eval_seq_len=32)).lanes


# -- tokenizers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [splitter(r"\p{N}", ignore_merges=False), splitter(r"\p{N}{1,3}", ignore_merges=True), lambda table: None],
    ids=["qwen2", "llama-bpe", "gpt-2"],
)
def test_the_tokenizer_in_a_file_gives_the_ids_of_the_original(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    source = with_tokenizer(tmp_path / "m", change)
    file = gguf_of(quantized(source, tmp_path / "q"))
    found, wanted = load_tokenizer(open_checkpoint(file)), AutoTokenizer.from_pretrained(source)
    for text in [*TEXTS, "", "<s>x</s> <unk>", (DEMO / "heldout.txt").read_text("utf-8")[:20_000]]:
        assert found(text)["input_ids"] == wanted(text)["input_ids"], text
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (found, wanted)]
        assert plain[0] == plain[1], text
        assert found.decode(plain[0]) == wanted.decode(plain[1])


def test_an_unknown_splitter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "m", splitter(r"\p{N}{1,2}", ignore_merges=False))
    file = gguf_of(quantized(source, tmp_path / "q"), gguf_pre="tekken")
    with pytest.raises(
        CalibrationError, match=r"the splitter 'tekken'; expected .*; name the original with --reference"
    ):
        llmquant.evaluate(file, recipe=few())
    assert llmquant.evaluate(file, reference=source, recipe=few()).lanes
