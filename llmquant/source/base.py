"""A checkpoint in a local folder, and what other kinds of source override.

Headers are read and checked first. Weights are read tensor by tensor, with plain reads instead of a memory map. Only
safetensors files are read; pickles never.
"""

import errno
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import SourceError, option
from llmquant.log import Progress
from llmquant.source.config import (
    is_embedding,
    is_head,
    is_packed,
    safe_config,
    says_tied,
    told_quantization,
    with_tagged_limits,
    without_quantization,
    without_tie,
)
from llmquant.source.files import refuse_pointer, sort_out, weight_files
from llmquant.source.header import MAX_HEADER_BYTES, TensorInfo, header_length, parse_header, parse_json
from llmquant.source.remote_code import code_files, references

NAME_THE_ORIGINAL = "name the checkpoint that it was made from; eval, compare and inspect read the file itself"


def _all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf. The ends of the range show that, thirty times as fast as every entry: where one
    entry is NaN, both ends are NaN."""
    return not tensor.numel() or all(math.isfinite(float(end)) for end in tensor.aminmax())


class Source:
    """A checked checkpoint: `config`, `tensors` by name, and `read`. Use `open_source` to make one.

    code        the checkpoint's own Python files that may be run: none without `trust_remote_code`
    untied      config.json ties the head to the embedding, and another head is stored: `config` no longer does
    left_over   the method of a quantization that config.json names, where no tensor is quantized; `config` does not
    """

    untied, left_over = False, ""
    in_parallel = True  # whether several threads may `read` at once

    def __init__(
        self, name: str, folder: Path, revision: str | None = None, *, trust_remote_code: bool = False
    ) -> None:
        self.name = name
        self.revision = revision
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.code: tuple[str, ...] = ()
        if ggufs := gguf_files(self.files()):
            raise OnlyGGUFError(self, ggufs)
        self.config = self._config()
        self.tensors = self._tensors()
        if (told := told_quantization(self.config)) and not any(map(is_packed, self.tensors.values())):
            self.left_over, self.config = str(told.get("quant_method", "no method")), without_quantization(self.config)
        if self._has_own_head():
            self.config, self.untied = without_tie(self.config), True
        if trust_remote_code:
            self.code = code_files(name, set(self.files()), self.json, self.local)
        for file in self.side_files():  # fetch and check them now: transformers reads them later by itself
            self.local(file)

    def tokenizer(self) -> Any:
        """The tokenizer, if the file of the weights holds it (GGUF); None if it has files of its own."""
        return None

    # -- what a Hub source overrides -------------------------------------------------------------------
    def files(self) -> list[str]:
        """Names of all files, relative to the checkpoint's folder."""
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and ".cache" not in path.relative_to(self.folder).parts
        )

    def local(self, file: str) -> Path:
        """A path where `file` can be read now. SourceError if it is missing or a link out of the checkpoint."""
        path = self.folder / relative(file)
        try:
            if not path.is_file():
                raise SourceError(self.name, f"{file} is missing", remedy="download the checkpoint again")
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise SourceError(
                f"{self.name}: {file}", f"cannot be read ({error.strerror})", remedy="check its owner and its mode"
            ) from None
        if self._leads_out(path):
            raise SourceError(
                f"{self.name}: {file}",
                "is a link that leads out of the checkpoint",
                remedy="put the file itself there, or name the folder in which it lies",
            )
        refuse_pointer(path, f"{self.name}: {file}")
        return path

    def _leads_out(self, path: Path) -> bool:
        root, target = self.folder.resolve(), path.resolve()
        # The Hub's cache keeps all files in the folder `blobs`; a folder in `snapshots` holds links to them.
        blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
        return not target.is_relative_to(root) and not target.is_relative_to(blobs)

    def size_of(self, file: str) -> int | None:
        """Bytes of a file; None where it is a link out of the checkpoint."""
        return None if self._leads_out(self.folder / file) else (self.folder / file).stat().st_size

    def is_local(self, name: str) -> bool:
        """Whether the tensor can be read without a download."""
        return True

    def download_bytes(self) -> int:
        """Bytes of the weights that are not on this machine yet."""
        return 0

    def stored_as(self, name: str) -> str | None:
        """The packed form that the tensor is stored in; None if it is stored as it is read."""
        return None

    def parts(self, name: str) -> list[TensorInfo]:
        """The stored tensors that `name` is read from."""
        return [self.tensors[name]]

    def made_of(self, name: str) -> tuple[str, ...]:
        """The tensors of `as_stored` that `name` is made of."""
        return (name,)

    def origin(self, name: str) -> str:
        """What the tensor was made of; "" if it is stored as such."""
        return ""

    def as_stored(self) -> "Source":
        """The same checkpoint, its tensors as its files have them, but dense."""
        return self

    def listed(self, names: Iterable[str]) -> "Source":
        """The same checkpoint, its tensors listed as `names` has them, where it knows two ways."""
        return self

    @property
    def slices(self) -> dict[str, list[str]]:
        """Stored tensors that are listed in several parts -> their names."""
        return {}

    def prefetch(self, names: Iterable[str]) -> None:
        """Say which tensors will be read next. A Hub source fetches their files in the meantime."""

    def _header(self, file: str) -> tuple[bytes, int]:
        path = self.local(file)
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = header_length(file, stream.read(8), size)
            return stream.read(length), size

    def json(self, file: str) -> dict[str, Any]:
        """One of its JSON files. SourceError if it is too large or not an object."""
        path = self.local(file)
        if (size := path.stat().st_size) > MAX_HEADER_BYTES:
            raise SourceError(f"{self.name}: {file}", f"{size} bytes of JSON", expected=f"at most {MAX_HEADER_BYTES}")
        return parse_json(path.read_bytes(), file)

    # -- common ----------------------------------------------------------------------------------------
    @property
    def weight_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The tensor `name`, bit for bit, in its own dtype."""
        return self._read_at(self.tensors[name])

    def read_entry(self, name: str, index: int) -> Tensor:
        """Entry `index` of a tensor along its first axis, without reading the others."""
        info = self.tensors[name]
        size = info.nbytes // info.shape[0]
        start = info.start + index * size
        return self._read_at(replace(info, shape=info.shape[1:], start=start, end=start + size))

    def _read_at(self, info: TensorInfo) -> Tensor:
        """The bytes of one tensor, by plain reads: if a mapped file shrinks, the system kills the process."""
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view, done = buffer.numpy().data.cast("B"), 0
        with self.local(info.file).open("rb", buffering=0) as stream:
            stream.seek(info.start)
            while done < info.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise SourceError(
                        f"{info.file}: {info.name}", "the file ended early", remedy="it changed during the run"
                    )
                done += count
        return buffer.view(info.dtype).view(info.shape)

    def read_finite(self, name: str) -> Tensor:
        """`read`; SourceError that names the tensor if it holds NaN or Inf."""
        tensor = self.read(name)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _all_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise SourceError(
                name, f"{count} NaN or Inf values", expected="finite weights", remedy="the checkpoint is damaged"
            )
        return tensor

    @property
    def side_bytes(self) -> int:
        """Bytes of the side files, plus a megabyte for the files that a run adds."""
        return 2**20 + sum(self.local(file).stat().st_size for file in self.side_files())

    def side_files(self) -> list[str]:
        """Names of files that are copied to the output: tokenizer, chat template, generation config, licence, code."""
        return self._sorted_out()[0]

    @property
    def left_behind(self) -> dict[str, str]:
        """Other files of the checkpoint, and why they are not copied to the output."""
        return self._sorted_out()[1]

    def _sorted_out(self) -> tuple[list[str], dict[str, str]]:
        weights = {info.file for info in self.tensors.values()}
        return sort_out(self.files(), weights, self.code, self.size_of)

    @property
    def safe_config(self) -> dict[str, Any]:
        """`config` as transformers and the output may see it. auto_map stays only if its code may be run."""
        return safe_config(self.config, keep_code=bool(self.code))

    def announce(self, log: Progress) -> None:
        """Say which Python code of the checkpoint is run, before it is, and what is read otherwise than it says."""
        if self.left_over:
            log.line(f"{self.name}: config.json tells of a quantization ({self.left_over}), but its weights are dense")
        if self.code:
            at = f"@{self.revision[:12]}" if self.revision else ""
            log.line(f"--trust-remote-code: code of {self.name}{at} is run: {', '.join(self.code)}")
        elif self.trust_remote_code:
            log.line(f"--trust-remote-code: {self.name} brings no code of its own")

    def code_remedy(self, file: str = "config.json") -> str:
        """The remedy of an error, if the checkpoint's own code would be needed; "" if `file` names no code."""
        remedy = f"remote code is not run without {option('trust_remote_code')}: read it first"
        has_code = file in self.files() and any(references(self.json(file)))
        return remedy if has_code and not self.code else ""

    def _config(self) -> dict[str, Any]:
        if "config.json" not in self.files():
            raise SourceError(self.name, "no config.json", expected="a Hugging Face checkpoint")
        return with_tagged_limits(self.json("config.json"))

    def _has_own_head(self) -> bool:
        """Whether a head other than the embedding is stored, and config.json ties it to the embedding all the same.

        transformers uses such a head; vLLM, mlx-lm and llama.cpp's converter believe the config. Two equal tensors are
        a tie; those of the Hub are not compared, as they would have to be downloaded first.
        """
        if not says_tied(self.config):
            return False
        heads, embeddings = list(filter(is_head, self.tensors)), list(filter(is_embedding, self.tensors))
        if not heads or not embeddings:
            return False
        if self.revision is not None or len(heads) != len(embeddings):
            return True
        return not torch.equal(self.read(heads[0]), self.read(embeddings[0]))

    def _tensors(self) -> dict[str, TensorInfo]:
        files = set(self.files())
        shards, weight_map = weight_files(self.name, files, self.config), None
        if isinstance(shards, str):
            index, weight_map = shards, self.json(shards).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SourceError(index, "no weight_map", expected="tensor name -> file")
            shards = sorted({_shard(index, name, file, files) for name, file in weight_map.items()})
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name, info in parse_header(shard, *self._header(shard)).items():
                if name in tensors or (weight_map is not None and weight_map.get(name) != shard):
                    raise SourceError(f"{shard}: {name}", "lies in a file that the index does not name for it")
                tensors[name] = info
        if weight_map is not None and (missing := sorted(set(weight_map) - set(tensors))):
            raise SourceError(index, f"names {missing[0]!r}, which {weight_map[missing[0]]} does not hold")
        return tensors


def _shard(index: str, name: str, file: Any, files: set[str]) -> str:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise SourceError(index, f"{name!r} lies in {str(file)[:80]!r}", expected="a .safetensors file")
    relative(file)
    if file not in files:
        raise SourceError(index, f"{name!r} lies in {file!r}, which is missing", remedy="download the checkpoint again")
    return file


class OnlyGGUFError(SourceError):
    """A folder or repository whose weights are GGUF files. `open_checkpoint` reads one; a run cannot start from it."""

    def __init__(self, source: Source, files: list[str]) -> None:
        self.source: Source | None = source  # through which the files are fetched; a copy in another process has none
        self.files = files
        super().__init__(
            source.name,
            f"holds {files[0]!r} and no safetensors weights",
            expected="a Hugging Face checkpoint",
            remedy=NAME_THE_ORIGINAL,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make, (kind, args, state) = super().__reduce__()
        return make, (kind, args, state | {"source": None})  # it may hold locks and threads


def gguf_files(files: Iterable[str]) -> list[str]:
    """The GGUF files at the root of a checkpoint; none if there are safetensors weights as well."""
    names = list(files)
    return (
        []
        if any(f.endswith(".safetensors") for f in names)
        else [f for f in names if re.fullmatch(r"[^/]+\.gguf", f, re.IGNORECASE)]
    )


def relative(file: str) -> str:
    """`file` itself; SourceError if it would lead out of the checkpoint's folder."""
    if file.startswith(("/", "~")) or ".." in Path(file).parts or "\0" in file or "\\" in file:
        raise SourceError(repr(file)[:80], "a path that leads out of the checkpoint")
    return file
