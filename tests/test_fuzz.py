"""Mutants of real headers, indexes and configs: opened as they are, or refused by SourceError, soon and cheaply."""

import json
import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llmquant.errors import SourceError
from llmquant.model.skeleton import Skeleton
from llmquant.source.files import INDEX
from llmquant.source.resolve import open_source

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**32 + 1, 2**53, 2**62, 2**63, 10**30, -(2**63), 0.5, 1e308, 1e-9)
OTHERS = (None, True, False, "", "x", "../x", "F32", [], [0], [[]], {}, {"a": {}}, "\x00", "\ud800", "é" * 300)
Json = Any


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("fuzz") / "llama", tiny.ARCHITECTURES["llama"], shard="100KB")


def places(value: Json) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *places(item)]
    return found


def mutated(value: Json, dice: random.Random) -> None:
    """One structural change somewhere in `value`: replaced, removed, renamed, copied, or nested."""
    if not (spots := places(value)):
        return
    container, key = dice.choice(spots)
    other, name = dice.choice(spots)
    what = dice.randrange(6)
    if what == 0 or (what in (2, 3) and isinstance(container, list)):
        container[key] = dice.choice(NUMBERS)
    elif what == 1:
        container[key] = dice.choice(OTHERS)
    elif what == 2:
        del container[key]
    elif what == 3:
        container[str(dice.choice((*OTHERS, name)))] = container.pop(key)
    elif what == 4:
        container[key] = json.loads(json.dumps(other[name]))
    else:
        container[key] = [container[key]] if dice.random() < 0.5 else {"text_config": container[key]}


def scrambled(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, put in, taken out or repeated."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at, what = dice.randrange(len(changed) + 1), dice.randrange(4)
        if what == 0:
            changed[at : at + 1] = bytes([dice.randrange(256)])
        elif what == 1:
            changed[at:at] = bytes(dice.choice(b'{}[]",:0919eE-. \\u\x00\xff') for _ in range(dice.randint(1, 9)))
        elif what == 2:
            del changed[at : at + dice.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + dice.randint(1, 200)]
    return bytes(changed)


def mutant(data: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        return scrambled(data, dice)
    value = json.loads(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        mutated(value, dice)
    return json.dumps(value).encode()


def spoil(folder: Path, dice: random.Random) -> str:
    """Change one file of the checkpoint; its name."""
    file = dice.choice((INDEX, "config.json", "shard", "shard"))
    if file != "shard":
        (folder / file).write_bytes(mutant((folder / file).read_bytes(), dice))
        return file
    shard = dice.choice(sorted(folder.glob("*.safetensors")))
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    prefix = data[:8]
    if dice.random() < 0.8:
        header = mutant(header, dice)
    if dice.random() < 0.8:
        prefix = len(header).to_bytes(8, "little")
    elif dice.random() < 0.5:
        prefix = dice.getrandbits(64).to_bytes(8, "little")
    if dice.random() < 0.2:
        rest = rest[: dice.randrange(len(rest))]
    shard.write_bytes(prefix + header + rest)
    return "shard"


def fuzz(checkpoint: Path, folder: Path, count: int, seed: int) -> Counter[str]:
    """What became of `count` mutants."""
    dice, fates, slowest = random.Random(seed), Counter[str](), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        copy = Path(shutil.copytree(checkpoint, folder / "copy"))
        file = spoil(copy, dice)
        begin = time.process_time()
        try:
            source = open_source(copy)
            if file == "config.json":
                Skeleton(source, torch.device("cpu"), torch.float32)
            else:
                # The bytes of every tensor lie inside its file.
                assert all(info.end <= (copy / info.file).stat().st_size for info in source.tensors.values())
            fates[f"{file} opened"] += 1
        except SourceError as error:
            message = str(error)
            assert message.isprintable(), (seed, number)
            assert len(message) < 2000, (seed, number)
            fates[f"{file} refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutant {number} of {file}") from error
        slowest = max(slowest, time.process_time() - begin)
        shutil.rmtree(copy)
    assert slowest < 2  # a second on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024
    return fates


def test_mutants_are_opened_or_refused(checkpoint: Path, tmp_path: Path) -> None:
    fates = fuzz(checkpoint, tmp_path, 250, 1)
    assert all(fates[f"{file} refused"] >= 10 for file in (INDEX, "config.json", "shard")), fates


@pytest.mark.soak
def test_twenty_thousand_mutants_are_opened_or_refused(checkpoint: Path, tmp_path: Path) -> None:
    print(sorted(fuzz(checkpoint, tmp_path, 20_000, 2).items()))
