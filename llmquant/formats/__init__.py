"""How bytes lie. A format turns the canonical codes and scales into named tensors and a config, and reads them back.

A new format is one file and one line in FORMATS.
"""

from llmquant.formats.awq import AWQ
from llmquant.formats.base import Format, LinearSpec
from llmquant.formats.compressed_tensors import CompressedTensors
from llmquant.formats.fake import Fake
from llmquant.formats.gguf import GGUF
from llmquant.formats.gptq import GPTQ
from llmquant.formats.mlx import MLX

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ(),
    "awq": AWQ(),
    "mlx": MLX(),
    "gguf": GGUF(),
    "fake": Fake(),
}
# Formats that hold the dequantized weights in the checkpoint's own dtype, and no codes.
DENSE = frozenset({"fake"})

__all__ = ["DENSE", "FORMATS", "Format", "LinearSpec"]
