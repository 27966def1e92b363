"""`llmquant verify` on a finished folder: right ones pass, every kind of change is found."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import repaired
from gguf_files import ARCHITECTURES, LLAMA3
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.cli import app as cli
from llmquant.errors import VerifyError
from llmquant.export import export
from llmquant.gguf.header import read_header
from llmquant.output import check
from llmquant.output.check import verify_folder
from llmquant.output.verify import DECODERS, digest, read_places
from llmquant.report.ledger import TensorRow
from llmquant.report.plain import parse

TINY: dict[str, Any] = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_data": "none"}


@pytest.fixture(scope="module")
def finished(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    llmquant.quantize(tiny_model("llama"), llmquant.make_recipe("x", flags=TINY), out)
    return out


@pytest.mark.parametrize(
    "flags",
    [{}, {"format": "fake"}, {"format": "awq", "symmetric": False}, {"format": "gptq"}, {"format": "mlx"}],
    ids=str,
)
def test_what_a_run_wrote_is_right(flags: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("qwen2")
    llmquant.quantize(source, llmquant.make_recipe("x", flags=TINY | flags), tmp_path / "out")
    found = verify_folder(tmp_path / "out", source)
    assert found.quantized > 0
    assert found.copied > 0
    assert found.against is not None


@pytest.mark.parametrize(("name", "extra"), [("llama", {"rope_parameters": LLAMA3}), ("gemma2", {}), ("phi3", {})])
def test_a_gguf_folder_is_right_and_damage_is_found(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    """Written by a run and by an export; then a row is copied over another one, and a norm changed."""
    source = tiny.build(tmp_path / "m", tiny.ARCHITECTURES[name], **extra | ARCHITECTURES[name])
    out = tmp_path / "out"
    llmquant.quantize(source, llmquant.make_recipe("x", flags=TINY | {"format": "gguf"}), out)
    llmquant.quantize(source, llmquant.make_recipe("x", flags=TINY), tmp_path / "ct")
    exported = export(tmp_path / "ct", "gguf", tmp_path / "exported")
    for folder in (out, exported):
        found = verify_folder(folder, source)
        assert (found.quantized, found.against) == (3 * (4 if name == "phi3" else 7), "m")
    with pytest.raises(VerifyError, match=r"weight: "):
        verify_folder(out, tiny.build(tmp_path / "n", tiny.ARCHITECTURES[name], **extra | {"initializer_range": 0.03}))
    (file,) = out.glob("*.gguf")
    whole = file.read_bytes()
    with file.open("rb") as stream:
        tensors = read_header(stream, file.name, len(whole)).tensors
    swapped = "attn_qkv" if name == "phi3" else "attn_k"
    for key, damage in (
        (f"blk.0.{swapped}.weight", swap_rows),
        ("output_norm.weight", lambda part: bytes(4) + part[4:]),
    ):
        place = tensors[key]
        part = damage(whole[place.start : place.end])
        file.write_bytes(whole[: place.start] + part + whole[place.end :])
        repaired(out)
        with pytest.raises(VerifyError, match=r"weight: does not decode to what was computed"):
            verify_folder(out)


def swap_rows(part: bytes) -> bytes:
    """Of 64 weights in Q4_0."""
    return part[36:72] + part[:36] + part[72:]


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    repaired(folder)


def lied(folder: Path) -> None:
    """Digests that fit the changed tensors, too: as if they were what the run had computed."""
    report, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("report", "manifest"))
    places, name = read_places(folder), report["recipe"]["format"]
    for row in report["tensors"]:
        spec = check._spec(parse(TensorRow, row, "row"))
        packed = spec is not None and name in DECODERS
        parts = DECODERS[name](spec, places) if packed else (places[row["name"]].raw(),)
        manifest["tensors"][row["name"]] = digest(*parts)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another report.json in a folder that fits it."""
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))
    repaired(folder)


Q, K = "model.layers.1.self_attn.q_proj.", "model.layers.0.self_attn.q_proj."
NORM = "model.layers.0.input_layernorm.weight"
BUGS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "one bit of a code": lambda t: t[Q + "weight_packed"].view(torch.uint8)[0, :1].bitwise_xor_(1),
    "nibbles swapped": lambda t: t[Q + "weight_packed"].copy_((t[Q + "weight_packed"] & 0x0F0F0F0F) << 4),
    "words in another order": lambda t: t[Q + "weight_packed"].copy_(t[Q + "weight_packed"].flip(1)),
    "rows in another order": lambda t: t[Q + "weight_packed"].copy_(t[Q + "weight_packed"].flip(0)),
    "an offset of one": lambda t: t[Q + "weight_packed"].bitwise_xor_(0x11111111),
    "a scale doubled": lambda t: t[Q + "weight_scale"][3:4].mul_(2),
    "a scale's sign": lambda t: t[Q + "weight_scale"][0, :1].neg_(),
    "scales in another order": lambda t: t[Q + "weight_scale"].copy_(t[Q + "weight_scale"].flip(1)),
    "a scale of zero": lambda t: t[Q + "weight_scale"][0, :1].zero_(),
    "a scale of NaN": lambda t: t[Q + "weight_scale"][0, :1].fill_(torch.nan),
    "two layers exchanged": lambda t: t.update({Q + "weight_packed": t[Q.replace("1", "0") + "weight_packed"].clone()}),
    "a wrong shape noted": lambda t: t[Q + "weight_shape"].copy_(t[Q + "weight_shape"].flip(0) + 1),
    "a norm changed": lambda t: t["model.norm.weight"][:1].add_(0.5),
    "a norm of NaN": lambda t: t["model.norm.weight"][:1].fill_(torch.nan),
    "an embedding row lost": lambda t: t["model.embed_tokens.weight"][5].zero_(),
    "a tensor missing": lambda t: t.pop("model.norm.weight"),
    "a packed part missing": lambda t: t.pop(Q + "weight_scale"),
    "a tensor too many": lambda t: t.update(extra=torch.zeros(3)),
    "a scale of Inf": lambda t: t[Q + "weight_scale"][0, :1].fill_(torch.inf),
    "a scale off by its last bit": lambda t: t[Q + "weight_scale"].view(torch.int16)[0, :1].add_(1),
    "codes a column further": lambda t: t[Q + "weight_packed"].copy_(t[Q + "weight_packed"].roll(1, 1)),
    "another layer's scales": lambda t: t.update({Q + "weight_scale": t[K + "weight_scale"].clone()}),
    "the head as a copy of the embedding": lambda t: t["lm_head.weight"].copy_(t["model.embed_tokens.weight"]),
    "a norm in another dtype": lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
    "an embedding of fewer rows": lambda t: t.update(
        {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].clone()}
    ),
    "two norms exchanged": lambda t: t.update(
        {NORM: t[NORM.replace("input", "post_attention")], NORM.replace("input", "post_attention"): t[NORM]}
    ),
}
WEIGHTS = ("quantization_config", "config_groups", "group_0", "weights")
TOLD: dict[str, tuple[tuple[str, ...], Any]] = {  # what config.json tells loaders
    "another group size": ((*WEIGHTS, "group_size"), 64),
    "other bits": ((*WEIGHTS, "num_bits"), 8),
    "a dense head not named": (("quantization_config", "ignore"), []),
    "a quantized layer named as dense": (("quantization_config", "ignore"), ["lm_head", Q.rstrip(".")]),
    "nothing of the quantization": (("quantization_config",), None),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_wrong_packer_is_caught_though_the_manifest_fits(name: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    verify_folder(folder)
    changed(folder, BUGS[name])
    with pytest.raises(VerifyError):
        verify_folder(folder)


@pytest.mark.parametrize("name", TOLD)
def test_a_config_that_tells_loaders_otherwise_is_caught(name: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    path, value = TOLD[name]
    config = table = json.loads((folder / "config.json").read_text())
    for key in path[:-1]:
        table = table[key]
    assert table[path[-1]] != value
    table[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    repaired(folder)
    with pytest.raises(VerifyError, match=r"config\.json"):
        verify_folder(folder)


def test_side_files_and_config_are_those_of_the_original(
    finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, change in {
        "tokenizer.json": lambda path: path.write_bytes(path.read_bytes() + b" "),
        "generation_config.json": lambda path: path.unlink(),
        "config.json": lambda path: path.write_text(
            path.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"')
        ),
    }.items():
        folder = shutil.copytree(finished, tmp_path / name)
        change(folder / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        if not (folder / name).exists():
            del manifest["files"][name]
            (folder / "manifest.json").write_text(json.dumps(manifest))
        repaired(folder)
        verify_folder(folder)
        with pytest.raises(VerifyError, match=name):
            verify_folder(folder, tiny_model("llama"))


def test_changed_missing_and_added_files_are_named(finished: Path, tmp_path: Path) -> None:
    for name, change in {
        "tokenizer.json": lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "),
        "config.json": lambda path: path.unlink(),
        "notes.json": lambda path: path.write_text("{}"),
        "vocab.txt": lambda path: path.write_text("x"),
        "extra.safetensors": lambda path: path.write_text("x"),
        "modeling.py": lambda path: path.write_text("x"),
    }.items():
        folder = shutil.copytree(finished, tmp_path / name)
        change(folder / name)
        with pytest.raises(VerifyError, match=name):
            verify_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VerifyError, match=r"manifest\.json: cannot be read"):
        verify_folder(tmp_path / "empty")


def test_what_no_loader_reads_may_lie_beside_and_the_card_is_the_users(
    finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    added = [".DS_Store", ".ipynb_checkpoints/a.py", "Thumbs.db", "notes.txt", "plot.png"]
    for name in added:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = verify_folder(folder, tiny_model("llama"))
    assert found.added == tuple(added)
    assert not found.card_changed
    (folder / "README.md").write_text("my own words")
    assert verify_folder(folder).card_changed
    assert cli.main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "README.md is not as the run wrote it\n" in out
    assert f"added later, and read by no loader: {', '.join(added)}\n" in out


def test_another_original_is_noticed(finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "source")
    verify_folder(finished, source)
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    weight = "model.layers.2.mlp.up_proj.weight"
    tensors[weight] = tensors[weight].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=r"layers\.2\.mlp\.up_proj\.weight: relative error"):
        verify_folder(finished, source)


@pytest.mark.parametrize(
    ("name", "linear", "flags"),
    [("gpt2", "h.1.mlp.c_fc.weight", {"format": "fake"}), ("bloom", "h.1.mlp.dense_h_to_4h.weight", {})],
)
def test_weights_are_compared_where_the_checkpoint_has_other_names_than_the_model(
    name: str,
    linear: str,
    flags: dict[str, Any],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One code is wrong, and all that the folder says of itself fits it: only the original tells."""
    source = tiny.of_base_model(tiny_model(name), tmp_path / name)
    out = tmp_path / "out"
    llmquant.quantize(source, llmquant.make_recipe("x", flags=TINY | flags), out)
    found = verify_folder(out, source)
    assert (found.quantized, found.not_compared) == (12, {})

    def one_code(tensors: dict[str, torch.Tensor]) -> None:
        if flags:
            tensors[linear][0, 0] += 0.5
        else:
            tensors[f"{linear}_packed"].view(torch.uint8)[0, 0] ^= 8  # the highest bit

    changed(out, one_code)
    lied(out)
    verify_folder(out)
    with pytest.raises(VerifyError, match=rf"^{re.escape(linear)}: relative error .* against {name}; expected"):
        verify_folder(out, source)
    edited(out, lambda report: [row.pop("module", None) for row in report["tensors"]])  # of an older version
    assert verify_folder(out, source).not_compared == {check.OLD_REPORT: 12}
    assert cli.main(["verify", str(out), "--source", str(source)]) == 0
    assert f"12 not compared: {check.OLD_REPORT}" in capsys.readouterr().out


def test_a_layer_without_an_error_is_not_passed_over(
    finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    edited(folder, lambda report: report["layers"].pop(3))
    with pytest.raises(VerifyError, match=r"weight: layer .* is not among the report's"):
        verify_folder(folder, tiny_model("llama"))
    edited(folder, lambda report: [layer.update(weight_error=float("nan")) for layer in report["layers"]])
    with pytest.raises(VerifyError, match=r"report\.json: layers\[0\]\.weight_error: nan; expected a finite number"):
        verify_folder(folder, tiny_model("llama"))


@pytest.mark.parametrize("action", ["quantized", "copied"])
def test_a_ledger_that_does_not_fit_the_weights_is_an_error_by_name(
    action: str, finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever a row of report.json says otherwise, and the manifest fits it."""
    folder = shutil.copytree(finished, tmp_path / "out")
    whole = (folder / "report.json").read_bytes()
    values: dict[str, list[Any]] = {
        "bits": [0, 3, 8, 99, None],
        "group_size": [0, -2, 7, 64, -1, 10**9],
        "symmetric": [None, "yes"],
        "shape": [[], [64], [64, 64, 64], [1, 1], [-64, 64]],
        "dtype": ["float8_e4m3fn", "load", ""],
        "action": ["quantized" if action == "copied" else "copied", "lost"],
        "name": ["", "x.weight"],
        "module": ["x"],
    }
    names = values if action == "quantized" else ("shape", "action", "name")
    for key in names:
        for value in values[key]:

            def change(report: dict[str, Any], key: str = key, value: Any = value) -> None:
                next(row for row in report["tensors"] if row["action"] == action)[key] = value

            edited(folder, change)
            with pytest.raises(VerifyError):
                verify_folder(folder, tiny_model("llama"))
            (folder / "report.json").write_bytes(whole)


def test_the_command_says_what_it_compared(
    finished: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(finished), "--source", str(tiny_model("llama"))]) == 0
    said = capsys.readouterr().out
    assert "21 quantized" in said
    assert "compared with" in said
    assert cli.main(["verify", str(finished.parent)]) == 8


# -- what loaders are told, and what lies beside the weights ----------------------------------------------
def run_of(name: str, source: Path, out: Path, **flags: Any) -> Path:
    llmquant.quantize(source, llmquant.make_recipe("x", flags=TINY | {"method": "rtn", "format": name} | flags), out)
    return out


def config_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


LISTED = "modules_in_block_to_quantize"
UNTOLD: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no list of dense linears": ("awq", lambda q: q.pop("modules_to_not_convert"), "does not name"),
    "no bits": ("awq", lambda q: q.pop("bits"), "does not say how many bits"),
    "bits of null": ("awq", lambda q: q.update(bits=None), "bits: None; expected 4"),
    "a group of null": ("gptq", lambda q: q.update(group_size=None), "group_size: None; expected 32"),
    "no list of quantized linears": ("gptq", lambda q: q.pop(LISTED), f"{LISTED}: is missing, and model.layers"),
    "one not listed": ("gptq", lambda q: q[LISTED].pop(), f"{LISTED}: does not name"),
    "one listed too many": ("gptq", lambda q: q[LISTED].append(["mlp.up_proj"]), f"{LISTED}: names mlp.up_proj"),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_what_loaders_are_not_told_is_no_shrug(what: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, message = UNTOLD[what]
    out = run_of(name, tiny_model("qwen2"), tmp_path / "out", ignore=["up_proj"])
    verify_folder(out)
    config_of(out, lambda config: change(config["quantization_config"]))
    repaired(out)
    with pytest.raises(VerifyError, match=message):
        verify_folder(out)


def test_dense_weights_that_loaders_would_unpack_are_caught(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = run_of("fake", tiny_model("llama"), tmp_path / "out")
    config_of(out, lambda config: config.update(quantization_config={"quant_method": "awq", "bits": 4}))
    repaired(out)
    with pytest.raises(VerifyError, match=r"config\.json: tells of a quantization"):
        verify_folder(out)


def test_what_the_original_does_not_have_is_named(
    finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, change, message in (
        ("a", lambda f: config_of(f, lambda c: c.update(rope_scaling={"factor": 2})), r"config\.json: rope_scaling"),
        ("b", lambda f: config_of(f, lambda c: c.pop("rms_norm_eps")), r"config\.json: rms_norm_eps"),
        ("c", lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), r"^chat_template\.jinja: is not in"),
    ):
        folder = shutil.copytree(finished, tmp_path / name)
        change(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        for file in folder.iterdir():
            if file.name != "manifest.json":
                manifest["files"].setdefault(file.name, {"bytes": 0})
        (folder / "manifest.json").write_text(json.dumps(manifest))
        repaired(folder)
        verify_folder(folder)
        with pytest.raises(VerifyError, match=message):
            verify_folder(folder, tiny_model("llama"))


def test_a_tensor_of_the_manifest_that_no_row_names_is_caught(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["gone.weight"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match=r"^gone\.weight: is in the manifest and in no row"):
        verify_folder(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"files": {}, "tensors": []}', '{"files": {"x": 1}, "tensors": {}}', "{"]
)
def test_a_damaged_manifest_is_one_error(content: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(VerifyError, match=r"manifest\.json: (cannot be read|has no tables of files and tensors)"):
        verify_folder(folder)


def test_exports_beside_are_compared_tensor_by_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage that the manifest fits, in each of them; and a tied head, which GGUF leaves out, is said."""
    extra = {"tie_word_embeddings": True, "rope_parameters": LLAMA3}
    source = tiny.build(tmp_path / "m", tiny.ARCHITECTURES["llama"], **extra)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    whole = run_of("compressed-tensors,gptq,mlx,fake,gguf", source, tmp_path / "out")
    assert verify_folder(whole, source).exports == ("gptq", "mlx", "fake", "gguf")
    assert cli.main(["verify", str(whole)]) == 0
    assert "and so are its exports (gptq, mlx, fake, gguf)" in capsys.readouterr().out

    def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        return damage

    def norm(folder: Path) -> None:
        (file,) = folder.glob("*.gguf")
        data = bytearray(file.read_bytes())
        with file.open("rb") as stream:
            place = read_header(stream, file.name, len(data)).tensors["output_norm.weight"]
        data[place.start : place.start + 4] = bytes(4)
        file.write_bytes(data)

    def base(folder: Path) -> None:
        (file,) = folder.glob("*.gguf")
        data = bytearray(file.read_bytes())
        at = data.index(b"llama.rope.freq_base") + 24
        data[at : at + 4] = bytes(4)
        file.write_bytes(data)

    linear = "model.layers.0.mlp.up_proj"
    for name, change, message in (
        ("gptq", stored(lambda t: t[f"{linear}.qweight"][:1, :1].bitwise_xor_(1)), linear),
        ("fake", stored(lambda t: t[f"{linear}.weight"][:1, :1].mul_(2)), rf"{linear}\.weight: does not decode"),
        ("mlx", stored(lambda t: t["model.norm.weight"][:1].add_(0.5)), r"model\.norm\.weight: does not decode"),
        ("mlx", lambda folder: config_of(folder, lambda c: c["quantization"].update(bits=8)), r"config\.json: bits"),
        ("gguf", norm, r"model\.norm\.weight: does not decode"),
        ("gguf", base, r"rope\.freq_base: 0\.0; expected 500\.0"),
    ):
        folder = shutil.copytree(whole, tmp_path / "copy")
        change(folder / name)
        repaired(folder)
        with pytest.raises(VerifyError, match=message):
            verify_folder(folder)
        shutil.rmtree(folder)
    alone = run_of("gguf", source, tmp_path / "alone")
    left = {"left out of the GGUF file (tied to the embedding)": 1}
    assert verify_folder(alone, source).not_compared == left
    assert verify_folder(export(whole, "gguf", tmp_path / "exported"), source).not_compared == left
