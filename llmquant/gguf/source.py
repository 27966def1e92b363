"""A GGUF file as a checkpoint: names, rows and config as transformers has them; tensors are read one by one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.gguf.config import FACTORS, Described
from llmquant.gguf.file import FLOATS
from llmquant.gguf.gpt2 import is_conv1d
from llmquant.gguf.header import GGUFHeader, read_header
from llmquant.gguf.vocabulary import tokenizer_of
from llmquant.paths import expanded, shown_name
from llmquant.source.base import OnlyGGUFError, Source
from llmquant.source.config import without_quantization
from llmquant.source.files import refuse_pointer
from llmquant.source.header import TensorInfo

_FLOATS = {name: dtype for dtype, name in FLOATS.items()}
CONFIG = "config.json"


def open_gguf_file(model: str | Path) -> Source | None:
    """The checkpoint in the file at this path, with the config.json of its folder; None if it is no GGUF file."""
    path = expanded(model, SourceError)
    try:
        if path.suffix.lower() != ".gguf" or not path.is_file():
            return None
    except OSError:  # a name that no file can have
        return None
    beside = path.parent / CONFIG
    return GGUFSource(shown_name(path.with_suffix("")), path, beside if beside.is_file() else None)


def open_gguf_of(found: OnlyGGUFError) -> Source:
    """The only GGUF file of a folder, or of a repository on the Hub, from which it is downloaded whole."""
    source, files = found.source, found.files
    assert source is not None
    if len(files) > 1:
        raise SourceError(
            source.name,
            f"holds {len(files)} GGUF files ({', '.join(files)[:200]})",
            expected="one",
            remedy="name the path of one (`hf download` fetches one from the Hub)",
        )
    beside = source.local(CONFIG) if CONFIG in source.files() else None
    return GGUFSource(source.name, source.local(files[0]), beside, source.revision)


class GGUFSource(Source):
    """A GGUF file. `tensors` have transformers' names and rows; those stored in blocks are uint8 [rows, row bytes]."""

    in_parallel = False

    def __init__(self, name: str, path: Path, config: Path | None, revision: str | None = None) -> None:
        # Not Source.__init__: there is only one file, and its metadata gives what other checkpoints have in files.
        self.name, self.revision, self.folder = name, revision, path.parent
        self.trust_remote_code, self.code = False, ()
        self._paths = {path.name: path} | ({} if config is None else {CONFIG: config})
        refuse_pointer(path, path.name)
        with path.open("rb") as stream:
            self.header = read_header(stream, path.name, path.stat().st_size)
        self._refuse_split(path.name)
        shapes = {key: tensor.shape for key, tensor in self.header.tensors.items()}
        model = Described(path.name, self.header.metadata, shapes)
        self.names = model.names
        self.tensors = self._tensors_of(path.name, self.header)
        self.config = model.config({} if config is None else self.json(CONFIG), self._factors(path.name))
        self.config = without_quantization(self.config)  # it speaks of other weights in that folder
        if blocks := {self._ours[key]: t for key, t in self.header.tensors.items() if self._in_blocks(key)}:
            self.config["quantization_config"] = {
                "quant_method": "gguf",
                "types": {key: tensor.block.name for key, tensor in blocks.items()},
                "shapes": {key: list(tensor.shape) for key, tensor in blocks.items()},
            }

    def _refuse_split(self, file: str) -> None:
        if (parts := self.header.metadata.get("split.count", 1)) not in (0, 1):
            raise SourceError(
                file, f"is one of {str(parts)[:20]} parts", remedy="join them: llama-gguf-split --merge FIRST-PART OUT"
            )

    def _in_blocks(self, key: str) -> bool:
        return key in self._ours and self.header.tensors[key].block.name not in _FLOATS

    def _tensors_of(self, file: str, header: GGUFHeader) -> dict[str, TensorInfo]:
        self._ours: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for key, tensor in header.tensors.items():
            if key in FACTORS:
                continue
            name = self.names.ours(key)
            if name is None or name in tensors:
                raise SourceError(
                    f"{file}: {key!r}",
                    f"is no tensor of {self.names.architecture}" if name is None else "is there twice",
                )
            shape, block = tensor.shape, tensor.block
            if (heads := self.names.heads_of(name)) is not None and shape[0] % (2 * heads):
                raise SourceError(f"{file}: {key!r}", f"{shape[0]} rows", expected=f"those of {heads} heads")
            if is_conv1d(name) and len(shape) != 2:
                raise SourceError(f"{file}: {key!r}", f"{len(shape)} dimensions", expected="a matrix")
            self._ours[key] = name
            if block.name not in _FLOATS:
                shape = (*shape[:-1], shape[-1] // block.weights * block.nbytes)
            elif is_conv1d(name):
                shape = shape[::-1]
            tensors[name] = TensorInfo(
                name, file, _FLOATS.get(block.name, torch.uint8), shape, tensor.start, tensor.end
            )
        return tensors

    def _factors(self, file: str) -> dict[str, Tensor]:
        found = {}
        for key in FACTORS:
            if (tensor := self.header.tensors.get(key)) is not None:
                if tensor.block.name != "F32" or len(tensor.shape) != 1:
                    got = f"{tensor.block.name} {list(tensor.shape)}"
                    raise SourceError(f"{file}: {key!r}", got, expected="a row of F32 numbers")
                found[key] = self._read_at(TensorInfo(key, file, torch.float32, tensor.shape, tensor.start, tensor.end))
        return found

    def files(self) -> list[str]:
        return list(self._paths)

    def local(self, file: str) -> Path:
        """The path of `file`. Needs no check: the user named it, or it was checked where it was found."""
        return self._paths[file]

    def read(self, name: str) -> Tensor:
        return self.names.back(name, super().read(name))

    def tokenizer(self) -> Any:
        return tokenizer_of(self.header.metadata, self.name)
