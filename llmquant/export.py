"""A finished checkpoint in another format: codes and scales read back exactly, written tensor by tensor.

Nothing is quantized anew and the original model is not needed; one linear is in memory at a time.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.card import make_card
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.errors import FormatError, SourceError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.formats.base import Layout
from llmquant.formats.gguf import kind_of
from llmquant.gguf_file import FLOATS, Entry, build_gguf
from llmquant.gguf_model import GGUFModel
from llmquant.gguf_tokenizer import tokenizer_metadata
from llmquant.grid import QuantizedWeight, QuantScheme
from llmquant.lint import verdicts
from llmquant.log import Log, silent
from llmquant.packed import PackedLinear
from llmquant.plan import Plan, Row
from llmquant.recipe import parse_size
from llmquant.run_dir import RunDir
from llmquant.skeleton import Skeleton, is_linear
from llmquant.source import Source, natural_key, safe_config
from llmquant.verify import Record, verify_output
from llmquant.verify_gguf import verify_gguf

_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's numbers for "mostly of this type"


def export(
    model: str | Path,
    format_name: str,
    out: str | Path,
    *,
    gguf_pre: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    log: Log = silent,
) -> Path:
    """Write the checkpoint `model`, which llmquant made, to the folder `out` in another format, and verify it.

    gguf_pre   llama.cpp's name of the tokenizer's splitter, where it is not recognised
    Raises SourceError where `model` holds no integer grid, FormatError where the format cannot hold it.
    """
    source = open_packed(model)
    exporter = Export(source, format_name, gguf_pre)
    run = RunDir(Path(out), overwrite=overwrite, needed_bytes=exporter.plan.output_bytes + source.side_bytes)
    with run:
        exporter.write(run, parse_size("--max-shard-size", max_shard_size), log)
        report = exporter.report() | {"files": run.weight_files()}
        run.write_json("report.json", report)
        run.write_bytes("README.md", make_card(run.out.name, report).encode())
        run.commit(exporter.record.digests)
    return run.out


def check_exports(names: Sequence[str], source: Source, skeleton: Skeleton, plan: Plan) -> None:
    """FormatError where a run with this plan could not be exported to these formats; before the work."""
    for name in names:
        FORMATS[name].check(plan.specs)
        FORMATS[name].config(plan.specs, plan.dense_linears)
        if name == "gguf":
            model = GGUFModel(skeleton.model.config.to_dict())
            for row in plan.rows:
                if row.name in skeleton.param_of:
                    model.name(row.name)
            tokenizer_metadata(source, skeleton.vocab_size, None)


def export_beside(names: Sequence[str], run: RunDir, max_shard_bytes: int, log: Log) -> None:
    """The checkpoint that `run` holds, which is written and verified, in other formats, each in its own folder."""
    for name in names:
        source = open_checkpoint(run.path)
        assert isinstance(source, PackedSource)
        source.name = run.out.name
        Export(source, name).write(run, max_shard_bytes, log, f"{name}/")


def open_packed(model: str | Path) -> PackedSource:
    """A checkpoint that llmquant wrote and whose linears are on integer grids."""
    source = open_checkpoint(model)
    if not isinstance(source, PackedSource):
        raise SourceError(source.name, "is not quantized", expected="a checkpoint that llmquant wrote")
    if "report.json" not in source.files():
        raise SourceError(source.name, "no report.json", expected="a checkpoint that llmquant wrote")
    return source


class Export:
    """One checkpoint on its way into one format; everything that can be refused is refused here."""

    def __init__(self, source: PackedSource, format_name: str, gguf_pre: str | None = None) -> None:
        if format_name not in FORMATS:
            raise FormatError("--format", repr(format_name), expected=f"one of {', '.join(FORMATS)}")
        self.source, self.format_name, self.format = source, format_name, FORMATS[format_name]
        self.skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
        self.plan = self._make_plan()
        self.gguf = None
        self.record = Record(format_name)
        if format_name == "gguf":
            self.gguf = _GGUFWriter(self, gguf_pre)
            self.plan = self.gguf.plan

    def _make_plan(self) -> Plan:
        groups = _common_group(list(self.source.packed.values()))
        rows = [self._row(key, groups) for key in sorted(self.source.tensors, key=natural_key)]
        specs = [row.spec for row in rows if row.spec is not None]
        self.format.check(specs)
        layout: Layout = {}
        for row in rows:
            info = self.source.tensors[row.name]
            layout |= self.format.layout(row.spec) if row.spec else {row.name: (info.dtype, info.shape)}
        quantized = {spec.module for spec in specs}
        dense = [n for n, m in self.skeleton.model.named_modules() if is_linear(m) and n not in quantized]
        self.format.config(specs, dense)
        return Plan(tuple(rows), tuple(dense), layout)

    def _row(self, key: str, common: int | None) -> Row:
        info = self.source.tensors[key]
        dtype, linear = str(info.dtype).removeprefix("torch."), self.source.packed.get(key)
        if linear is None:
            return Row(key, "copied", f"dense in {self.source.method}", dtype, info.shape, None)
        if linear.grid is None or key not in self.skeleton.param_of:
            raise SourceError(key, f"{self.source.method} weights that are no integer grid", expected="a grid")
        module = self.skeleton.param_of[key].removesuffix(".weight")
        zeros = None if linear.symmetric else linear.grid(self.source.stored.read).zeros_OG
        size = linear.shape[1] // linear.n_groups
        group = -1 if linear.n_groups == 1 and size != common else size
        scheme = QuantScheme(linear.bits, group, zeros is None or not bool(zeros.any()))
        kind = type(self.skeleton.model.get_submodule(module)).__name__
        spec = LinearSpec(key, module, kind, linear.shape, linear.dtype, scheme)
        return Row(key, "quantized", f"quantized in {self.source.method}", dtype, linear.shape, None, spec)

    def canonical(self, spec: LinearSpec) -> QuantizedWeight:
        """Codes, scales and zeros of one linear, exactly as they are stored."""
        linear = self.source.packed[spec.key]
        assert linear.grid is not None
        grid = linear.grid(self.source.stored.read)
        zeros = None if spec.scheme.symmetric or grid.zeros_OG is None else grid.zeros_OG.contiguous().to(torch.int8)
        in_order = torch.arange(spec.shape[1]) // spec.scheme.group(spec.shape[1])
        try:
            if grid.group_I is not None and not torch.equal(grid.group_I, in_order):
                raise ValueError("its groups are not in the order of the columns")
            codes = grid.codes_OI.contiguous().to(torch.int8)
            return QuantizedWeight(codes, grid.scales_OG.contiguous().float(), spec.scheme, zeros)
        except ValueError as error:
            raise SourceError(spec.key, str(error), expected="a grid as llmquant makes it") from None

    def write(self, run: RunDir, max_shard_bytes: int, log: Log, folder: str = "") -> None:
        """All files of the format into `folder` of the output ("" or a name with a slash), verified."""
        if self.gguf is not None:
            self.gguf.write(run, folder)
            log(f"verified: {len(self.gguf.names)} tensors re-read from disk, equal to those of {self.source.name}")
            return
        record = self.record
        run.open_shards(self.plan.layout, max_shard_bytes, folder)
        for row in self.plan.rows:
            if row.spec is not None:
                weight = self.canonical(row.spec)
                record.quantized(row.spec, weight)
                for name, tensor in self.format.tensors(row.spec, weight).items():
                    run.write_tensor(name, tensor)
            else:
                tensor = self.source.read_finite(row.name)
                record.copied(row.name, tensor)
                run.write_tensor(row.name, tensor)
        run.close_shards()
        config = safe_config(self.source.config) | self.format.config(self.plan.specs, self.plan.dense_linears)
        run.write_json(f"{folder}config.json", config)
        for file in self.source.side_files():
            run.write_bytes(folder + file, self.source.local(file).read_bytes())
        verify_output(run.path / folder, self.plan, record)
        log(f"verified: {len(self.plan.layout)} tensors re-read from disk, equal to those of {self.source.name}")

    def report(self) -> dict[str, Any]:
        """The report of the checkpoint that was exported: its figures hold, since the numbers are the same."""
        report: dict[str, Any] = json.loads(self.source.local("report.json").read_text("utf-8"))
        report["exported_from"] = report["recipe"]["format"]
        report["recipe"] |= {"format": self.format_name, "exports": []}
        report["runtimes"] = {self.format_name: verdicts(self.plan.specs, self.format_name, self.plan.dense_linears)}
        report["bits_per_weight"] = self.plan.bits_per_weight(self.format_name)
        lane = ((report["evaluation"] or {}).get("lanes") or {}).get("llmquant")
        if lane is not None:
            size = {"bits_per_weight": report["bits_per_weight"], "bytes": self.plan.output_bytes}
            lane |= size
        return report


def _common_group(linears: Sequence[PackedLinear]) -> int | None:
    """The one group size of all linears with several groups; a linear as wide as it has one group of it."""
    sizes = {linear.shape[1] // linear.n_groups for linear in linears if linear.n_groups > 1}
    return sizes.pop() if len(sizes) == 1 else None


class _GGUFWriter:
    """One .gguf file of an Export."""

    def __init__(self, export: Export, pre: str | None) -> None:
        self.export, source, skeleton = export, export.source, export.skeleton
        self.model = GGUFModel(skeleton.model.config.to_dict())
        rows = [row for row in export.plan.rows if self._wanted(row)]
        self.names = {row.name: self.model.name(row.name) for row in rows}
        self.heads = {key: heads for key in self.names if (heads := self.model.heads_of(key)) is not None}
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
        self.plan = Plan(tuple(rows), export.plan.dense_linears, layout)
        vocab = source.tensors[next(key for key, name in self.names.items() if name == "token_embd.weight")].shape[0]
        self.metadata = self.model.metadata(source.name, _FILE_TYPES[self.kind], vocab)
        self.metadata |= tokenizer_metadata(source, vocab, pre)

    def _wanted(self, row: Row) -> bool:
        """A head that is tied to the embedding is left out, as are tensors that the model does not have."""
        tied = row.name == "lm_head.weight" and bool(self.model.config.get("tie_word_embeddings"))
        return row.name in self.export.skeleton.param_of and not tied

    def _entry(self, row: Row) -> Entry:
        info = self.export.source.tensors[row.name]
        name = self.names[row.name]
        if row.spec is not None:
            (stored,) = self.export.format.layout(row.spec).values()
            return Entry(name, kind_of(row.spec.scheme), row.spec.shape, stored)
        dtype = torch.float32 if len(info.shape) == 1 else info.dtype
        if dtype not in FLOATS:
            raise FormatError(row.name, f"{row.dtype} in gguf", expected="bfloat16, float16 or float32")
        return Entry(name, FLOATS[dtype], info.shape, (dtype, info.shape))

    def write(self, run: RunDir, folder: str) -> None:
        """Header first, then tensor by tensor; then re-read."""
        file, record = f"{folder}model-{self.kind}.gguf", self.export.record
        head, places = build_gguf(file, self.metadata, self.entries)
        run.open_file(file, head, places)
        for row in self.plan.rows:
            if row.spec is not None:
                weight = self.export.canonical(row.spec)
                record.quantized(row.spec, weight)
                (blocks,) = self.export.format.tensors(row.spec, weight).values()
                run.write_tensor(self.names[row.name], self.model.rows(row.name, blocks))
            else:
                tensor = self._dense(row.name)
                record.copied(row.name, tensor)  # in the checkpoint's order of rows, into which the reader puts them
                run.write_tensor(self.names[row.name], self.model.rows(row.name, tensor))
        run.close_shards()
        verify_gguf(run.path / file, self.plan, record, self.names, self.heads)
        for side in self.export.source.side_files():
            if side.upper().startswith(("LICEN", "NOTICE", "USE_POLICY", "COPYING")):
                run.write_bytes(folder + side, self.export.source.local(side).read_bytes())

    def _dense(self, key: str) -> Tensor:
        return (
            self.computed[key] if key in self.computed else self.model.dense(key, self.export.source.read_finite(key))
        )
