"""GPTQ, version 1, symmetric, columns in their own order: opened by transformers (optimum, gptqmodel), vLLM, SGLang.

For a weight [N, K] of b bits in groups of g (layout of AutoGPTQ): qweight int32 [K b / 32, N], codes q + 2^(b-1) from
the lowest bit up along K; scales [K / g, N]; qzeros int32 [K / g, N b / 32] along N, each zero MINUS ONE, which for a
symmetric grid is 2^(b-1) - 1 everywhere; g_idx int32 [K] = k // g. Asymmetric grids are refused: a zero of 0 would be
stored as -1 and carry into its neighbour.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats.base import Format, Layout, LinearSpec, commonest, half_dtype, in_block, signed, unsigned
from llmquant.formats.facts import fused_names
from llmquant.formats.packing import pack_rows, unpack_rows
from llmquant.quant.grid import QuantizedWeight, QuantScheme

_ZEROS = {4: 0x77777777, 8: 0x7F7F7F7F}


class GPTQ(Format):
    name = "gptq"

    def layout(self, spec: LinearSpec) -> Layout:
        (rows, columns), bits = spec.shape, spec.scheme.bits
        groups = spec.scheme.groups(columns)
        return {
            f"{spec.prefix}qweight": (torch.int32, (columns * bits // 32, rows)),
            f"{spec.prefix}qzeros": (torch.int32, (groups, rows * bits // 32)),
            f"{spec.prefix}scales": (half_dtype(spec), (groups, rows)),
            f"{spec.prefix}g_idx": (torch.int32, (columns,)),
        }

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        columns, bits = spec.shape[1], spec.scheme.bits
        zeros = self.layout(spec)[f"{spec.prefix}qzeros"][1]
        return {
            f"{spec.prefix}qweight": pack_rows(unsigned(weight), bits).T.contiguous(),
            f"{spec.prefix}qzeros": torch.full(zeros, _ZEROS[bits], dtype=torch.int32),
            f"{spec.prefix}scales": weight.scales_OG.T.contiguous().to(half_dtype(spec)),
            f"{spec.prefix}g_idx": torch.arange(columns, dtype=torch.int32) // spec.scheme.group(columns),
        }

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        scheme = commonest(specs)
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "checkpoint_format": "gptq",
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": True,
                "desc_act": False,
                "true_sequential": True,
                "lm_head": False,
                **self._only(specs, dense_linears),
                **self._dynamic(specs, scheme),
                "meta": {"quantizer": ["llmquant"]},
            }
        }

    def _dynamic(self, specs: Sequence[LinearSpec], usual: QuantScheme) -> dict[str, Any]:
        """The linears whose scheme is not the usual one, as GPTQModel, vLLM and SGLang read them: by patterns that
        must match from the start of the module's name on; the first that does decides.

        A set that servers run as one matrix is also listed under the matrix's name, by which some of them ask.
        """
        # What stored names may lack of the module's: `transformer.` in BLOOM.
        stored = specs[0].prefix.rstrip(".")
        lead = specs[0].module.removesuffix(stored) if specs[0].module.endswith(stored) else ""
        leaves: dict[tuple[str, QuantScheme], list[str]] = {}
        for spec in specs:
            if spec.scheme != usual:
                parent, _, leaf = spec.module.rpartition(".")
                leaves.setdefault((parent, spec.scheme), []).append(leaf)
        # One pattern for all blocks whose linears are treated alike, or a large model would have thousands.
        blocks: dict[tuple[str, str, tuple[str, ...], QuantScheme], list[str]] = {}
        for (parent, scheme), own in leaves.items():
            own += fused_names(own)
            before, number, behind = re.fullmatch(r"(.*?)(\d*)((?<=\d)\..*|)", parent).groups()  # type: ignore[union-attr]
            blocks.setdefault((before, behind, tuple(own), scheme), []).append(number)
        dynamic = {}
        for (before, behind, names, scheme), numbers in blocks.items():
            start = re.escape(before.removeprefix(lead))
            start = f"(?:{re.escape(lead)})?{start}" if lead else start
            pattern = f"+:^{start}(?:{'|'.join(numbers)}){re.escape(behind)}\\.(?:{'|'.join(map(re.escape, names))})$"
            dynamic[pattern] = {"bits": scheme.bits, "group_size": scheme.group_size}
        return {"dynamic": dynamic} if dynamic else {}

    def _only(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        """The linears of a block that are quantized, where not all are: the same ones in every block."""
        inner = [place for place in (in_block(spec.module) for spec in specs) if place is not None]
        stacks, quantized = {block.rpartition(".")[0] for block, _ in inner}, [name for _, name in inner]
        found = (place for place in map(in_block, dense_linears) if place is not None)
        dense = {name for block, name in found if block.rpartition(".")[0] in stacks}  # not those of a vision tower
        if not dense:
            return {}
        if both := sorted(dense.intersection(quantized)):
            raise FormatError(
                both[0],
                "is quantized in some blocks and dense in others",
                expected="gptq knows one list of linears for all blocks",
                remedy=f"let {option('ignore')} match it in every block, or use {option('format')} compressed-tensors",
            )
        return {"modules_in_block_to_quantize": [[name] for name in dict.fromkeys(quantized)]}

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        codes = unpack_rows(read(f"{spec.prefix}qweight").T, spec.scheme.bits, spec.shape[1])
        scales = read(f"{spec.prefix}scales").T.float().contiguous()
        return QuantizedWeight(signed(codes, spec.scheme.bits), scales, spec.scheme)
