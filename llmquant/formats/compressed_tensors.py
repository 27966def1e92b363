"""compressed-tensors, pack-quantized: opened by stock transformers, vLLM and SGLang.

For a weight [N, K] of b bits: weight_packed int32 [N, ceil(K b / 32)], unsigned codes q + 2^(b-1) from the lowest
bit up along K; weight_scale [N, K / g] in the model's dtype; weight_shape int64 [2].
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats.base import Format, Layout, LinearSpec, signed, unsigned
from llmquant.formats.packing import pack_rows, unpack_rows
from llmquant.quant.grid import QuantizedWeight, QuantScheme


class CompressedTensors(Format):
    name = "compressed-tensors"

    def check(self, specs: Sequence[LinearSpec]) -> None:
        super().check(specs)
        odd = [spec for spec in specs if spec.kind != "Linear"]
        if odd and len({spec.scheme for spec in specs}) > 1:  # `at_load` in `config`; it would unpack all alike
            raise FormatError(
                odd[0].module,
                f"{odd[0].kind} layers of several schemes in {self.name}",
                expected="one scheme: transformers unpacks such layers while it loads them, all by the first",
                remedy=f"leave out the rules, or use another {option('format')}",
            )

    def layout(self, spec: LinearSpec) -> Layout:
        rows, columns = spec.shape
        return {
            f"{spec.prefix}weight_packed": (torch.int32, (rows, ceil(columns * spec.scheme.bits / 32))),
            f"{spec.prefix}weight_scale": (spec.dtype, (rows, spec.scheme.groups(columns))),
            f"{spec.prefix}weight_shape": (torch.int64, (2,)),
        }

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            f"{spec.prefix}weight_packed": pack_rows(unsigned(weight), spec.scheme.bits),
            f"{spec.prefix}weight_scale": weight.scales_OG.to(spec.dtype),
            f"{spec.prefix}weight_shape": torch.tensor(spec.shape, dtype=torch.int64),
        }

    def weight_bits(self, spec: LinearSpec) -> int:
        rows, columns = spec.shape
        return rows * (columns * spec.scheme.bits + spec.scheme.groups(columns) * 8 * spec.dtype.itemsize)

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        schemes = list(dict.fromkeys(spec.scheme for spec in specs))
        groups = {f"group_{i}": self._group(scheme, specs, len(schemes) == 1) for i, scheme in enumerate(schemes)}
        # A subclass of nn.Linear may look at its dense weight while it is loaded (Falcon does): unpack at loading.
        at_load = {"dequantize": True} if any(spec.kind != "Linear" for spec in specs) else {}
        return {
            "quantization_config": {
                **at_load,
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                # Without this, transformers fills the weights with random numbers and only lists them as missing.
                "quantization_status": "compressed",
                "ignore": list(dense_linears),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
                "config_groups": groups,
            }
        }

    def _group(self, scheme: QuantScheme, specs: Sequence[LinearSpec], only: bool) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False}
        if scheme.group_size == -1:
            weights["strategy"] = "channel"
        else:
            weights |= {"strategy": "group", "group_size": scheme.group_size}
        targets = ["Linear"] if only else [spec.module for spec in specs if spec.scheme == scheme]
        return {
            "targets": targets,
            "format": "pack-quantized",
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight:
        codes = unpack_rows(read(f"{spec.prefix}weight_packed"), spec.scheme.bits, spec.shape[1])
        scales = read(f"{spec.prefix}weight_scale").float()
        return QuantizedWeight(signed(codes, spec.scheme.bits), scales, spec.scheme)
