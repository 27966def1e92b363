"""GGUF: literal bytes, the gguf package's own dequantization, and llama.cpp itself on every promised architecture."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf_files import ARCHITECTURES, TEXTS, gguf_of, quantized, splitter, with_tokenizer
from linears import counting, spec_of, weight_of
from peers import LlamaCpp, dequantized, divergence, log_probs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmquant.checkpoint import open_checkpoint
from llmquant.demo import DEMO
from llmquant.errors import FormatError, VerifyError
from llmquant.formats import FORMATS
from llmquant.gguf.file import Entry, build_gguf
from llmquant.gguf.model import GGUFModel
from llmquant.output.verify_gguf import read_gguf
from llmquant.quant.grid import QuantizedWeight
from llmquant.text.tokenizer import load_tokenizer

GGUF = FORMATS["gguf"]
VOCAB = 4096


# -- bytes ---------------------------------------------------------------------------------------------
def test_q4_0_bytes_of_a_block() -> None:
    """Unsigned codes count 0 3 6 9 c f 2 5 8 b e 1 4 7 a d twice: both halves of byte j are the same. 0.5 = 3800."""
    spec = spec_of(4, 32, (1, 32), module="m")
    blocks = GGUF.tensors(spec, QuantizedWeight(counting(1, 32), torch.tensor([[-0.5]]), spec.scheme))
    assert blocks["m.weight"].numpy().tobytes().hex() == "00b8" + "00336699ccff225588bbee114477aadd"


def test_q4_1_and_q8_0_bytes_of_a_block() -> None:
    """Zero -8 + 2: m = -2 d = -1, bc00."""
    spec = spec_of(4, 32, (1, 32), module="m", symmetric=False)
    codes, zeros = counting(1, 32), torch.tensor([[-6]], dtype=torch.int8)
    blocks = GGUF.tensors(spec, QuantizedWeight(codes, torch.tensor([[0.5]]), spec.scheme, zeros))
    assert blocks["m.weight"].numpy().tobytes().hex() == "0038" + "00bc" + "00336699ccff225588bbee114477aadd"
    spec = spec_of(8, 32, (1, 32), module="m")
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    blocks = GGUF.tensors(spec, QuantizedWeight(codes, torch.tensor([[2.0]]), spec.scheme))
    assert blocks["m.weight"].numpy().tobytes().hex() == "0040" + bytes(range(240, 256)).hex() + bytes(range(16)).hex()


def test_a_header_of_one_entry_of_each_kind() -> None:
    metadata = {"s": "ab", "n": 7, "f": 0.5, "b": True, "l": ["x"], "i": [1, -1]}
    head, places = build_gguf("f", metadata, [Entry("t", "F32", (2, 3), (torch.float32, (2, 3)))])
    key = {name: struct.pack("<Q", 1) + name.encode() for name in metadata}
    expected = b"GGUF" + struct.pack("<IQQ", 3, 1, 6)
    expected += key["s"] + struct.pack("<IQ", 8, 2) + b"ab" + key["n"] + struct.pack("<II", 4, 7)
    expected += key["f"] + struct.pack("<If", 6, 0.5) + key["b"] + struct.pack("<I", 7) + b"\1"
    expected += key["l"] + struct.pack("<IIQQ", 9, 8, 1, 1) + b"x" + key["i"] + struct.pack("<IIQii", 9, 5, 2, 1, -1)
    expected += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    assert head == expected + bytes(-len(expected) % 32)
    assert (places["t"].start, places["t"].end) == (len(head), len(head) + 24)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False)])
@pytest.mark.parametrize("group", [32, 96, -1])
def test_the_gguf_package_dequantizes_our_blocks_to_our_weight(bits: int, symmetric: bool, group: int) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    spec = spec_of(bits, group, (6, 192), symmetric=symmetric)
    weight = weight_of(spec)
    (blocks,) = GGUF.tensors(spec, weight).values()
    kind = {(4, True): "Q4_0", (8, True): "Q8_0", (4, False): "Q4_1"}[bits, symmetric]
    found = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))
    if symmetric:
        assert torch.equal(found, weight.dequantize())
    else:  # m = -(z + 8) d in fp16: half a unit of its last place, or of the smallest number
        bound = 15 * weight.scales_OG.abs().amax() * 2.0**-11 + 2.0**-25
        assert (found - weight.dequantize()).abs().max() <= bound


# -- llama.cpp -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rope"), [*((name, "default") for name in ARCHITECTURES), ("llama", "llama3"), ("gemma3", "linear")]
)
def test_llama_cpp_computes_the_same(name: str, rope: str, tmp_path: Path) -> None:
    """All linears but one are kept in float32, so that nothing hides a wrong name, order, norm or rope."""
    extra = dict(ARCHITECTURES[name])
    if rope == "llama3":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        extra["rope_parameters"] = scaling | {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "original_max_position_embeddings": 64,
        }
    if rope == "linear":  # as the larger ones have it, where there is no window
        full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
        local = {"rope_type": "default", "rope_theta": 10000.0}
        extra["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    source = tiny.build(
        tmp_path / "m",
        tiny.ARCHITECTURES[name],
        dtype=torch.float32,
        max_position_embeddings=512,
        initializer_range=0.2,  # attention that is not flat
        **extra,
    )
    out = quantized(source, tmp_path / "q", ignore=[r"^(?!.*layers\.0\.mlp\.down_proj).*proj"])
    ids = torch.randint(5, VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    ours = log_probs(dequantized(source, out), ids)
    cost = divergence(log_probs(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), ids), ours)
    llama = LlamaCpp(gguf_of(out))
    at = list(range(3, 60, 8))
    theirs = torch.stack([llama.log_probs(ids[: t + 1].tolist(), VOCAB) for t in at])
    # Their cache of keys and values is fp16 and their products take 8-bit activations: about 0.01 of the cost. With
    # a rope base 20 times too large it is 17 and more.
    assert divergence(ours[at], theirs) < 0.1 * cost


@pytest.mark.parametrize(
    "flags",
    [{}, {"bits": 8}, {"symmetric": False, "format": "awq"}, {"rules": ["down_proj: bits=8"]}],
    ids=["4", "8", "asymmetric", "mixed"],
)
def test_llama_cpp_agrees_on_the_demo_model_and_its_tokens(flags: dict[str, Any], tmp_path: Path) -> None:
    out = quantized("demo", tmp_path / "q", **flags)
    llama, tokenizer = LlamaCpp(gguf_of(out)), AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO / "heldout.txt").read_text("utf-8")[:4000]
    for part in (text, "Tab\there,  two spaces\n\n\nand ünïcödé 你好 🎉 don't 12345 I'LL ", ""):
        assert llama.tokenize(part) == tokenizer(part)["input_ids"]
    ids = torch.tensor(tokenizer(text)["input_ids"][:300])
    ours = log_probs(dequantized(DEMO, out), ids)
    original = log_probs(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), ids)
    at = list(range(20, 300, 9))
    theirs = torch.stack([llama.log_probs(ids[: t + 1].tolist(), VOCAB) for t in at])
    # Weights of 8 bits cost less than the 8-bit activations of their products do.
    assert divergence(ours[at], theirs) < (0.1 if flags.get("bits") != 8 else 10) * divergence(original[at], ours[at])
    assert divergence(ours[at], theirs) < 5e-4
    assert (ours[at].argmax(-1) == theirs.argmax(-1)).double().mean() >= 0.96  # at most one of 32 differs


@pytest.mark.parametrize(
    ("pre", "change"),
    [
        ("qwen2", splitter(r"\p{N}", ignore_merges=False)),
        ("llama-bpe", splitter(r"\p{N}{1,3}", ignore_merges=True)),
        ("gpt-2", lambda table: None),
    ],
)
def test_known_splitters_give_the_same_ids(pre: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "m", change)
    file = gguf_of(quantized(source, tmp_path / "q"))
    assert read_gguf(file)[0]["tokenizer.ggml.pre"] == pre
    llama, tokenizer = LlamaCpp(file), AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("kind", ["prepend", "replace", "metaspace"])
def test_sentencepiece_vocabularies_give_the_same_ids(kind: str, tmp_path: Path) -> None:
    """As in Llama 2 and Phi-3, Gemma, and Mistral 0.3."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special[:3], initial_alphabet=[], show_progress=False)
    lines = (DEMO / "calibration.txt").read_text("utf-8")[:200_000].splitlines()
    tokenizer.train_from_iterator([word for line in lines for word in line.split(" ") if word], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    table = json.loads(tokenizer.to_str())
    pieces = [token for token in table["model"]["vocab"] if token not in special]
    table["model"]["vocab"] = {token: index for index, token in enumerate([*special, *pieces])}
    if kind == "replace":
        table["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        table["pre_tokenizer"] = split
    if kind == "metaspace":
        table["normalizer"] = None
        table["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    source = tiny.build(tmp_path / "m", tiny.ARCHITECTURES["llama"], bos_token_id=1, eos_token_id=2)
    (source / "tokenizer.json").write_text(json.dumps(table))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out, named = quantized(source, tmp_path / "q"), {}
    if kind == "metaspace":
        with pytest.raises(FormatError, match="begins with a space; accept that with export --gguf-pre default"):
            gguf_of(out)
        named = {"gguf_pre": "default"}
    file = gguf_of(out, **named)
    llama, read_back = LlamaCpp(file), load_tokenizer(open_checkpoint(file))
    reference = AutoTokenizer.from_pretrained(source)
    for text in [*TEXTS, lines[0][:500]]:
        text = text.strip(" ") if kind == "metaspace" else text
        assert llama.tokenize(text) == reference(text)["input_ids"] == read_back(text)["input_ids"], text


def test_an_unknown_splitter_is_refused_and_can_be_named(tmp_path: Path) -> None:
    out = quantized(with_tokenizer(tmp_path / "m", splitter(r"\p{N}{1,2}", ignore_merges=False)), tmp_path / "q")
    with pytest.raises(FormatError, match=r"^tokenizer\.json: a byte-level BPE that is not known .*--gguf-pre"):
        gguf_of(out)
    assert read_gguf(gguf_of(out, gguf_pre="qwen2"))[0]["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["model"].update(type="WordPiece"), "a WordPiece model"),
        (lambda table: table.update(pre_tokenizer={"type": "Whitespace"}), "neither a byte-level BPE"),
        (lambda table: table.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    ],
)
def test_other_tokenizers_are_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    out = quantized(tiny.build(tmp_path / "m", tiny.ARCHITECTURES["llama"]), tmp_path / "q")
    table = json.loads((out / "tokenizer.json").read_text("utf-8"))
    change(table)
    (out / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(FormatError, match=message):
        gguf_of(out)


# -- models that llama.cpp would compute otherwise -----------------------------------------------------
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 128,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "olmo2"}, "model type 'olmo2'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "longrope"}, "model_type": "phi3"}, "rope type 'longrope'"),
        (GEMMA2 | {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
        (GEMMA2 | {"final_logit_softcapping": None}, "final_logit_softcapping None"),
        (GEMMA2 | {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (GEMMA3 | {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        (GEMMA3 | {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar 168; expected 16"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0; expected none"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}}, "rope of layers with a window 2"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    GGUFModel(CONFIG)
    with pytest.raises(FormatError, match=f"^gguf: {message}"):
        GGUFModel(CONFIG | change)


def test_the_context_ends_where_a_sliding_window_would_begin() -> None:
    assert GGUFModel(CONFIG).context == 512
    assert GGUFModel(CONFIG | {"model_type": "mistral", "sliding_window": 128}).context == 128
    off = {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert GGUFModel(CONFIG | off).context == 512
    assert GGUFModel(CONFIG | GEMMA3).context == 512


def test_the_largest_gemmas_scale_their_attention_by_another_width() -> None:
    for known, blocks in ((GEMMA2, 46), (GEMMA3, 62)):
        config = CONFIG | known | {"num_hidden_layers": blocks, "query_pre_attn_scalar": CONFIG["hidden_size"] // 4}
        assert GGUFModel(config).config["query_pre_attn_scalar"] == 16
        with pytest.raises(FormatError, match="query_pre_attn_scalar"):
            GGUFModel(config | {"head_dim": 32, "query_pre_attn_scalar": 32})


# -- the file re-read ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(quantized("demo", tmp_path_factory.mktemp("gguf") / "q"))


def test_the_gguf_package_reads_the_same_as_our_reader(demo_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    theirs, (metadata, places) = gguf.GGUFReader(demo_gguf), read_gguf(demo_gguf)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == metadata
    assert {t.name: t.data.tobytes() for t in theirs.tensors} == {n: p.raw().tobytes() for n, p in places.items()}


@pytest.mark.parametrize("at", [0, 4, 8, 30, -1])
def test_a_damaged_file_is_refused(demo_gguf: Path, at: int, tmp_path: Path) -> None:
    data = bytearray(demo_gguf.read_bytes())
    if at == -1:
        del data[-1]
    else:
        data[at] ^= 0xFF
    (tmp_path / "f.gguf").write_bytes(data)
    with pytest.raises(VerifyError):
        read_gguf(tmp_path / "f.gguf")


def test_every_tensor_of_the_demo_dequantizes_to_what_the_checkpoint_holds(demo_gguf: Path) -> None:
    """By the gguf package, rows of q and k put back by the inverse of llama.cpp's permutation."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    checkpoint = demo_gguf.parent.with_name("q")
    model = dequantized(DEMO, checkpoint).state_dict()
    names = GGUFModel(json.loads((checkpoint / "config.json").read_text())).name
    stored = {t.name: t for t in gguf.GGUFReader(demo_gguf).tensors}
    for key, weight in model.items():
        if key == "lm_head.weight":
            assert "output.weight" not in stored
            continue
        tensor = stored[names(key)]
        found = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(weight.shape)
        if ".q_proj" in key or ".k_proj" in key:
            heads = 8 if ".q_proj" in key else 4
            found = found.reshape(heads, 16, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(found, weight.numpy()), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_opens_the_file_with_exactly_our_weights(name: str, tmp_path: Path) -> None:
    """A second opinion on names, permutation and norms: transformers' own reader, which unpacks to dense."""
    pytest.importorskip("gguf", reason="needs the gguf package")
    source = tiny.build(tmp_path / "m", tiny.ARCHITECTURES[name], **ARCHITECTURES[name])
    out = quantized(source, tmp_path / "q")
    file = gguf_of(out)
    # The config that it derives from the file has a pad token and a head size of its own for some; it knows no mistral.
    config = None if name == "mistral" else AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    ours = dequantized(source, out).state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        # Gemma's norms were stored with 1 added, which rounds.
        close = 1e-7 if name.startswith("gemma") and "norm" in key else 0.0
        assert (theirs[key] - weight).abs().max() <= close, key
