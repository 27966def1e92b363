"""The two containers of a checkpoint: safetensors shards with a config, or one GGUF file. Runs and exports write both.

An Output knows every tensor that it will hold before the first one is written, and keeps the digest of each.
"""

from collections import Counter
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout
from llmquant.formats.facts import FACTS
from llmquant.formats.fake import Fake
from llmquant.formats.gguf import kind_of
from llmquant.gguf.file import FLOATS, Entry, build_gguf
from llmquant.gguf.gpt2 import is_conv1d
from llmquant.gguf.model import GGUFModel
from llmquant.gguf.tokenizer import tokenizer_metadata
from llmquant.model.classes import own_class
from llmquant.model.skeleton import Skeleton
from llmquant.output.gguf_spec import Expected
from llmquant.output.opens import Opening, check_opens
from llmquant.output.verify import Record, verify_output
from llmquant.output.verify_gguf import verify_gguf
from llmquant.plan import Plan, Row
from llmquant.quant.grid import QuantizedWeight
from llmquant.run_dir import RunDir
from llmquant.source.base import Source
from llmquant.source.files import is_licence

_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's numbers for "mostly of this type"


class Output(Protocol):
    """`plan` has a row for every tensor that is written, `left_out` for those of the source that are not.

    `opening` is what stock transformers will do with it, as far as that can be tried.
    """

    plan: Plan
    left_out: list[Row]
    opening: Opening
    record: Record

    def open(self, run: RunDir, max_shard_bytes: int, folder: str = "") -> None:
        """Open the files in `folder` of the run ("" or a name with a slash)."""

    def quantized(self, run: RunDir, spec: LinearSpec, weight: QuantizedWeight) -> None:
        """Write a linear."""

    def copied(self, run: RunDir, row: Row, tensor: Tensor | None = None) -> None:
        """Write a tensor that is not quantized: as the source holds it, or another one."""

    def read(self, run: RunDir, spec: LinearSpec) -> QuantizedWeight | Tensor:
        """A linear that was written before; a dense weight_OI where the format holds no codes."""

    def finish(self, run: RunDir, folder: str = "") -> None:
        """Once the weights are closed: the other files, and everything re-read and compared (VerifyError)."""


def open_output(
    format_name: str, source: Source, skeleton: Skeleton, plan: Plan, gguf_pre: str | None = None
) -> Output:
    """The container of a format. FormatError where it cannot hold the model; nothing is written yet."""
    if not FACTS[format_name].remote_code and "AutoModelForCausalLM" in (source.safe_config.get("auto_map") or {}):
        raise FormatError(
            format_name,
            f"a model of its own code ({option('trust_remote_code')})",
            expected="a model that its runtimes know",
        )
    if FACTS[format_name].one_file:
        return GGUFFile(format_name, source, skeleton, plan, gguf_pre)
    return Shards(format_name, source, plan, skeleton.device)


class Shards:
    """safetensors shards, config.json, and the source's tokenizer, generation config, template and licence.

    Codes are packed on `device`: an accelerator does in no time what takes a CPU as long as the rest of a block.
    """

    def __init__(self, format_name: str, source: Source, plan: Plan, device: torch.device) -> None:
        self.source, self.plan, self._device = source, plan, device
        self.left_out: list[Row] = []
        self.format, self.record = FORMATS[format_name], Record(format_name)
        # Raises here, not after hours, where the format cannot say which linears are dense.
        dense = plan.ignore if self.format.facts.patterns else plan.dense_linears
        self.entries = self.format.config(plan.specs, dense)
        self.opening = self._try()
        if self.opening.mended:
            self.entries["quantization_config"]["dequantize"] = True

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it will be written."""
        return self.format.model_config(self.source.safe_config) | self.entries

    def _try(self) -> Opening:
        """Ask transformers; of formats whose packed tensors it cannot be asked for, only the names of dense ones."""
        original: Layout = {name: (info.dtype, info.shape) for name, info in self.source.as_stored().tensors.items()}
        config, view = self.config, self.format
        if self.format.facts.tried == "names":
            del config["quantization_config"]
            view = Fake()
        rows = [row for row in self.plan.rows if row.spec is None]
        layout: Layout = {row.name: (getattr(torch, row.dtype), row.shape) for row in rows}
        for spec in self.plan.specs:  # not the plan's own layout: that is of the run's first format
            layout |= view.layout(spec)
        if not self.format.facts.tried or layout == original:
            return Opening()
        own = partial(own_class, self.source) if self.source.code else None
        return check_opens(config, layout, original, self.plan.specs, own)

    def open(self, run: RunDir, max_shard_bytes: int, folder: str = "") -> None:
        run.open_shards(self.plan.layout, max_shard_bytes, folder)

    def quantized(self, run: RunDir, spec: LinearSpec, weight: QuantizedWeight) -> None:
        self.record.quantized(spec, weight)
        for name, tensor in self.format.tensors(spec, weight.to(self._device)).items():
            run.tensors.write(name, tensor.cpu())

    def copied(self, run: RunDir, row: Row, tensor: Tensor | None = None) -> None:
        tensor = self.source.read_finite(row.name) if tensor is None else tensor
        self.record.copied(row.name, tensor)
        run.tensors.write(row.name, tensor)

    def read(self, run: RunDir, spec: LinearSpec) -> QuantizedWeight | Tensor:
        return self.format.read(spec, run.tensors.read)

    def finish(self, run: RunDir, folder: str = "") -> None:
        run.write_json(f"{folder}config.json", self.config)
        for file in self.source.side_files():
            run.write_bytes(folder + file, self.source.local(file).read_bytes())
        verify_output(run.path / folder, self.plan, self.record)


class GGUFFile:
    """One .gguf file: names, order of rows, metadata and tokenizer as llama.cpp wants them; and the licence."""

    def __init__(
        self, format_name: str, source: Source, skeleton: Skeleton, plan: Plan, pre: str | None = None
    ) -> None:
        self.source, self.skeleton, self.opening = source, skeleton, Opening()
        self.format, self.record = FORMATS[format_name], Record(format_name)
        self.model = GGUFModel(skeleton.model.config.to_dict())
        rows = [row for row in plan.rows if self._why_not(row) is None]
        self.left_out = [
            Row(row.name, "left out", why, row.dtype, row.shape, row.block)
            for row in plan.rows
            if (why := self._why_not(row)) is not None
        ]
        self.names = {row.name: self.model.name(row.name) for row in rows}
        self.expected = Expected(format_name, source.config)
        kinds = Counter(kind_of(row.spec.scheme) for row in rows if row.spec is not None)
        self.kind = kinds.most_common(1)[0][0]
        self.entries = [self._entry(row) for row in rows]
        self.computed: dict[str, Tensor] = {}
        if (factors := self.model.rope_factors()) is not None:
            name, shape = "rope_freqs.weight", tuple(factors.shape)
            self.computed[name], self.names[name] = factors, name
            self.entries.append(Entry(name, "F32", shape, (torch.float32, shape)))
            rows.append(Row(name, "copied", "computed from the config", "float32", shape, None))
        layout = {row.name: entry.stored for row, entry in zip(rows, self.entries, strict=True)}
        self.plan = Plan(tuple(rows), plan.dense_linears, layout)
        vocab = source.tensors[next(key for key, name in self.names.items() if name == "token_embd.weight")].shape[0]
        self.metadata = self.model.metadata(source.name, _FILE_TYPES[self.kind], vocab)
        self.metadata |= tokenizer_metadata(source, vocab, pre)
        # The same as of the finished file: here, not after hours.
        self.expected.check(self.metadata, self.names.values(), vocab)
        build_gguf(self.file, self.metadata, self.entries)

    @property
    def file(self) -> str:
        return f"model-{self.kind}.gguf"

    def _why_not(self, row: Row) -> str | None:
        """Why a tensor of the source is not written; None where it is."""
        if row.name not in self.skeleton.param_of:
            return "not a parameter of the model class"
        tied = row.name == "lm_head.weight" and bool(self.model.config.get("tie_word_embeddings"))
        return "tied to the embedding" if tied else None

    def _entry(self, row: Row) -> Entry:
        info = self.source.tensors[row.name]
        name = self.names[row.name]
        if row.spec is not None:
            (stored,) = self.format.layout(row.spec).values()
            return Entry(name, kind_of(row.spec.scheme), row.spec.shape, stored)
        dtype = torch.float32 if len(info.shape) == 1 else info.dtype
        if dtype not in FLOATS:
            raise FormatError(row.name, f"{row.dtype} in gguf", expected="bfloat16, float16 or float32")
        shape = info.shape[::-1] if is_conv1d(row.name) else info.shape
        return Entry(name, FLOATS[dtype], shape, (dtype, shape))

    def open(self, run: RunDir, max_shard_bytes: int, folder: str = "") -> None:
        """One file, whatever the size of shards."""
        run.open_file(folder + self.file, *build_gguf(folder + self.file, self.metadata, self.entries))

    def quantized(self, run: RunDir, spec: LinearSpec, weight: QuantizedWeight) -> None:
        self.record.quantized(spec, weight)
        (blocks,) = self.format.tensors(spec, weight).values()
        run.tensors.write(self.names[spec.key], self.model.rows(spec.key, blocks))

    def copied(self, run: RunDir, row: Row, tensor: Tensor | None = None) -> None:
        key = row.name
        if tensor is None:
            tensor = self.computed[key] if key in self.computed else self.source.read_finite(key)
        # By the reader's own rules, and in the checkpoint's order of rows, into which the reader puts them.
        self.record.copied(key, self.expected.order.as_stored(key, tensor))
        run.tensors.write(self.names[key], self.model.rows(key, self.model.dense(key, tensor)))

    def read(self, run: RunDir, spec: LinearSpec) -> QuantizedWeight | Tensor:
        order = self.model.rows(spec.key, torch.arange(spec.shape[0])).argsort()
        return self.format.read(spec, lambda key: run.tensors.read(self.names[key])[order])

    def finish(self, run: RunDir, folder: str = "") -> None:
        verify_gguf(run.path / folder / self.file, self.plan, self.record, self.source.config)
        for side in self.source.side_files():
            if is_licence(side):
                run.write_bytes(folder + side, self.source.local(side).read_bytes())
