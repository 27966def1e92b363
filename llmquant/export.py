"""A finished checkpoint in another format: codes and scales read back exactly, written tensor by tensor.

Nothing is quantized anew and the original model is not needed; one linear is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.draft import draft_model
from llmquant.errors import FormatError, SourceError, option
from llmquant.finished import canonical, open_packed, read_report
from llmquant.formats import FORMATS, LinearSpec
from llmquant.log import SILENT, Log, Progress, progress_of
from llmquant.output.containers import open_output
from llmquant.outside import outside, refuse_outside
from llmquant.paths import shown_name
from llmquant.plan import Plan, Row, lay_out
from llmquant.quant.grid import QuantScheme
from llmquant.recipe import Recipe, parse_size
from llmquant.report.card import make_card
from llmquant.report.data import RunReport, WeightFile
from llmquant.report.parts import runtimes_of
from llmquant.report.plain import plain
from llmquant.run_dir import RunDir
from llmquant.source.names import natural_key


def export(
    model: str | Path,
    format_name: str,
    out: str | Path,
    *,
    gguf_pre: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    log: Log = SILENT,
) -> Path:
    """Write the checkpoint `model`, which llmquant made, to the folder `out` in another format, and verify it.

    gguf_pre   llama.cpp's name of the tokenizer's splitter, where it is not recognised
    Raises SourceError where `model` holds no integer grid, FormatError where the format cannot hold it.
    """
    source = open_packed(model, trust_remote_code=trust_remote_code)
    measured = read_report(source)
    progress = progress_of(log)
    exporter = Export(source, format_name, progress, gguf_pre)
    run = RunDir(Path(out), overwrite=overwrite, needed_bytes=exporter.plan.output_bytes + source.side_bytes)
    with run:
        exporter.write(run, parse_size("max_shard_size", max_shard_size), progress)
        report = exporter.report(measured, run.weight_files())
        run.write_json("report.json", plain(report))
        run.write_bytes("README.md", make_card(shown_name(run.out), report).encode())
        run.commit(exporter.output.record.digests)
    return run.out


def export_beside(
    names: Sequence[str], run: RunDir, max_shard_bytes: int, log: Progress, *, trust_remote_code: bool = False
) -> None:
    """The checkpoint that `run` holds, which is written and verified, in other formats, each in its own folder."""
    for name in names:
        source = open_checkpoint(run.path, trust_remote_code=trust_remote_code)
        assert isinstance(source, PackedSource)
        source.name = shown_name(run.out)
        Export(source, name, SILENT).write(run, max_shard_bytes, log, f"{name}/")


class Export:
    """One checkpoint on its way into one format; everything that can be refused is refused here."""

    def __init__(self, source: PackedSource, format_name: str, log: Progress, gguf_pre: str | None = None) -> None:
        if format_name not in FORMATS:
            raise FormatError(option("format"), repr(format_name), expected=f"one of {', '.join(FORMATS)}")
        self.source, self.format_name, self.format = source, format_name, FORMATS[format_name]
        self.skeleton = draft_model(source, Recipe(device="cpu", dtype="float32"), log)
        self.output = open_output(format_name, source, self.skeleton, self._make_plan(), gguf_pre)
        self.plan = self.output.plan
        for finding in self.output.opening.findings:
            log.line(f"{format_name}: {finding}")

    @cached_property
    def _outside(self) -> dict[str, str]:
        return outside(self.skeleton)

    def _make_plan(self) -> Plan:
        rows = [self._row(key) for key in sorted(self.source.tensors, key=natural_key)]
        return lay_out(rows, self.skeleton, self.format_name)

    def _row(self, key: str) -> Row:
        info = self.source.tensors[key]
        dtype, linear = str(info.dtype).removeprefix("torch."), self.source.packed.get(key)
        if linear is None:
            return Row(key, "copied", f"dense in {self.source.method}", dtype, info.shape, None)
        if linear.grid is None or key not in self.skeleton.param_of:
            raise SourceError(key, f"{self.source.method} weights that are no integer grid", expected="a grid")
        module = self.skeleton.param_of[key].removesuffix(".weight")
        if (name := self._outside.get(module)) is not None:
            refuse_outside(self.format_name, name, module)
        zeros = None if linear.symmetric else linear.grid(self.source.stored.read).zeros_OG
        scheme = QuantScheme(
            linear.bits, linear.group_size or linear.shape[1] // linear.n_groups, zeros is None or not bool(zeros.any())
        )
        kind = type(self.skeleton.model.get_submodule(module)).__name__
        spec = LinearSpec(key, module, kind, (linear.shape[0], linear.shape[1]), linear.dtype, scheme)
        return Row(key, "quantized", f"quantized in {self.source.method}", dtype, linear.shape, None, spec)

    def write(self, run: RunDir, max_shard_bytes: int, log: Progress, folder: str = "") -> None:
        """All files of the format into `folder` of the output ("" or a name with a slash), verified."""
        self.output.open(run, max_shard_bytes, folder)
        for row in self.plan.rows:
            if row.spec is not None:
                self.output.quantized(run, row.spec, canonical(self.source, row.spec))
            else:
                self.output.copied(run, row)
        run.tensors.finish()
        self.output.finish(run, folder)
        log.line(f"verified: {len(self.plan.layout)} tensors re-read from disk, equal to those of {self.source.name}")

    def report(self, measured: RunReport, files: Mapping[str, Mapping[str, Any]]) -> RunReport:
        """`measured`, the report of the checkpoint that was exported: its figures hold, since the numbers are the same.

        files   size and digest of every file of weights, by name
        """
        code = () if self.format.facts.one_file else tuple(self.source.code)
        bits, evaluation = self.plan.bits_per_weight(self.format_name), measured.evaluation
        return replace(
            measured,
            exported_from=measured.recipe["format"],
            recipe={**measured.recipe, "format": self.format_name, "exports": []},
            model=replace(measured.model, remote_code=code),
            compute=replace(measured.compute, trust_remote_code=self.source.trust_remote_code),
            runtimes={self.format_name: runtimes_of(self.plan, self.format_name, self.output.opening.findings)},
            bits_per_weight=bits,
            evaluation=None if evaluation is None else evaluation.with_size(bits, self.plan.output_bytes),
            files={name: WeightFile(**facts) for name, facts in files.items()},
        )
