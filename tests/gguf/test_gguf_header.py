"""The reader of GGUF headers: what is refused, and mutants of real files."""

import io
import random
import struct
import time
from pathlib import Path

import pytest
import tiny
import torch
from gguf_files import gguf_of, quantized

from llmquant.checkpoint import open_checkpoint
from llmquant.errors import CalibrationError, SourceError
from llmquant.gguf.header import BLOCK_TYPES, GGUFHeader, read_header
from llmquant.model.skeleton import Skeleton
from llmquant.text.tokenizer import load_tokenizer


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def info(name: str = "t", sizes: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(
    entries: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: int = 32,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """One tensor of two rows of four floats, unless told otherwise."""
    entries, infos = entries or [], [info()] if infos is None else infos
    head = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(entries)))) + b"".join(entries + infos)
    return head + bytes(-len(head) % 32) + bytes(data)


def opened(data: bytes) -> GGUFHeader:
    return read_header(io.BytesIO(data), "f.gguf", len(data))


def test_entries_of_every_type_and_two_tensors() -> None:
    numbers = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
    entries = [text(f"k{kind}") + struct.pack(f"<I{code}", kind, 1) for code, kind in numbers.items()]
    entries += [text("s") + struct.pack("<I", 8) + text("é"), text("eps") + struct.pack("<If", 6, 1e-6)]
    entries += [text("l") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("")]
    entries += [text("n") + struct.pack("<IIQ3h", 9, 3, 3, -1, 0, 7)]
    infos = [info(), info("q", (64, 3), 2, 32), info("b", (3,), 30, 160)]
    for version in (2, 3):
        header = opened(file(entries, infos, 160 + 6, version=version))
        assert [header.metadata[f"k{kind}"] for kind in numbers.values()] == [1] * len(numbers)
        assert header.metadata["k7"] is True
        assert [header.metadata[key] for key in ("s", "eps", "l", "n")] == ["é", 1e-6, ["a", ""], [-1, 0, 7]]
        places = {t.name: (t.block.name, t.shape, t.end - t.start) for t in header.tensors.values()}
        assert places == {"t": ("F32", (2, 4), 32), "q": ("Q4_0", (3, 64), 108), "b": ("BF16", (3,), 6)}
        assert header.tensors["q"].start == header.tensors["t"].end
        assert header.tensors["b"].start == header.tensors["q"].start + 128


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {n: (b.name, b.weights, b.nbytes) for n, b in BLOCK_TYPES.items()}.items() <= theirs.items()


def test_the_alignment_of_the_metadata_holds() -> None:
    entry = text("general.alignment") + struct.pack("<II", 4, 8)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + entry + info("a", (1,)) + info("b", (1,), 0, 8)
    head += bytes(-len(head) % 8)
    header = opened(head + bytes(12))
    assert header.tensors["b"].start == header.tensors["a"].start + 8 == len(head) + 8


LIST = struct.pack("<I", 9)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its header goes on behind byte 0"),
    "magic": (file(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (file(version=1), "version 1; expected version 2 or 3"),
    "big-endian": (file(version=3 << 24), "is big-endian"),
    "tensor count": (file(counts=(2**63, 0)), f"{2**63} tensors; expected at most"),
    "entry count": (file(counts=(1, 2**40)), "entries of metadata; expected at most"),
    "more tensors": (file(counts=(9, 0)), r"f\.gguf"),
    "type of an entry": (file([text("k") + struct.pack("<I", 13)]), "'k': metadata of type 13"),
    "bool": (file([text("k") + struct.pack("<IB", 7, 2)]), "a bool of 2"),
    "array of arrays": (file([text("k") + LIST + struct.pack("<IQ", 9, 1)]), "an array of type 9"),
    "array length": (file([text("k") + LIST + struct.pack("<IQ", 4, 2**61)]), f"an array of {2**61} items"),
    "long array": (file([text("k") + LIST + struct.pack("<IQ", 0, 1_000_000)]), "its header goes on behind byte"),
    "text length": (file([text("k") + struct.pack("<IQ", 8, 2**62)]), "its header goes on behind byte"),
    "not UTF-8": (file([text("k") + struct.pack("<I", 8) + text(b"\xff")]), "text that is not UTF-8"),
    "key twice": (file([text("k") + struct.pack("<II", 4, 1)] * 2), "metadata 'k' occurs twice"),
    "key": (file([text("a\nb") + struct.pack("<II", 4, 1)]), "control characters"),
    "no name": (file(infos=[info("")]), "a name of 0 characters"),
    "name twice": (file(infos=[info(), info("t", offset=32)], data=64), "'t': a second tensor of this name"),
    "tensor type": (file(infos=[info(kind=4)]), "type 4; expected one of F32, F16, Q4_0"),
    "no dimensions": (file(infos=[info(sizes=())]), "0 dimensions"),
    "dimensions": (file(infos=[info(sizes=(1,) * 5)]), "5 dimensions"),
    "no rows": (file(infos=[info(sizes=(4, 0))]), "sizes .4, 0."),
    "half a block": (file(infos=[info(sizes=(48, 2), kind=2)]), "rows of whole blocks of 32"),
    "overlap": (file(infos=[info(), info("u", offset=0)], data=64), "'u': its bytes start at 0; expected 32"),
    "gap": (file(infos=[info(), info("u", offset=64)], data=96), "'u': its bytes start at 64; expected 32"),
    "huge": (file(infos=[info(sizes=(2**40, 2**40))]), r"expected 4\d{24} by its header; download it again"),
    "truncated": (file()[:-1], "by its header; download it again"),
    "too long": (file() + bytes(33), "by its header; download it again"),
    "alignment": (file([text("general.alignment") + struct.pack("<II", 4, 24)]), "general.alignment 24"),
    "no alignment": (file([text("general.alignment") + struct.pack("<II", 4, 0)]), "general.alignment 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(SourceError, match=message):
        opened(data)


def test_two_million_strings_are_not_built() -> None:
    """27 MB of empty names: refused by their number, before one is read."""
    entry = text("k") + LIST + struct.pack("<IQ", 8, 3_000_000)
    begin = time.process_time()
    with pytest.raises(SourceError, match="an array of 3000000 items; expected at most 2000000"):
        opened(file([entry], data=27_000_000))
    assert time.process_time() - begin < 1


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build(tmp_path_factory.mktemp("g") / "m", tiny.ARCHITECTURES["llama"], num_hidden_layers=1)
    return gguf_of(quantized(model, model.with_name("q")))


def fuzz(genuine: Path, copy: Path, count: int, seed: int) -> int:
    """How many of `count` mutants were opened; the others were refused by SourceError."""
    dice, data, n_opened, slowest = random.Random(seed), genuine.read_bytes(), 0, 0.0
    with genuine.open("rb") as stream:
        length = min(t.start for t in read_header(stream, "f", len(data)).tensors.values())
    tables = [
        data.index(b"general.architecture"),
        data.index(b"tokenizer.ggml.model"),
        data.index(b"token_embd.weight"),
    ]
    for number in range(count):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 1, 3))):
            # Most of a header is the vocabulary: half of the changes are made near its beginning and its table.
            near = dice.choice(tables) + dice.randrange(-40, 1500)
            at = max(0, near) if dice.random() < 0.5 else dice.randrange(length)
            what = dice.choice((0, 0, 1, 1, 1, 1, 2, 3))
            if what == 0:
                changed[at] = dice.randrange(256)
            elif what == 1:
                changed[at] ^= 1 << dice.randrange(8)
            elif what == 2:
                changed[at : at + 8] = struct.pack("<Q", dice.choice((0, 1, 7, 2**31, 2**32, 2**62, 2**64 - 1)))
            else:
                del changed[at : at + dice.randint(1, 40)]
        if dice.random() < 0.05:
            del changed[dice.randrange(len(changed)) :]
        copy.write_bytes(changed)
        begin = time.process_time()
        try:
            source = open_checkpoint(copy)
            for name in source.tensors:
                source.read(name)
            Skeleton(source, torch.device("cpu"), torch.float32)
            load_tokenizer(source)
            n_opened += 1
        except (SourceError, CalibrationError) as error:
            message = str(error)
            assert message.isprintable(), (seed, number)
            assert len(message) < 2000, (seed, number)
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutant {number}") from error
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < 2
    return n_opened


def test_mutants_are_opened_or_refused(genuine: Path, tmp_path: Path) -> None:
    assert 10 < fuzz(genuine, tmp_path / "mutant.gguf", 200, 1) < 190


@pytest.mark.soak
def test_ten_thousand_mutants_are_opened_or_refused(genuine: Path, tmp_path: Path) -> None:
    print(fuzz(genuine, tmp_path / "mutant.gguf", 10_000, 2), "of 10,000 opened")
