"""How bytes lie. A format turns the canonical codes and scales into named tensors and a config, and reads them back.

A new format is one file and one line in FORMATS.
"""

from llmquant.formats.base import Format, LinearSpec
from llmquant.formats.compressed_tensors import CompressedTensors
from llmquant.formats.fake import Fake

FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors(), "fake": Fake()}
# Formats that hold the dequantized weights in the checkpoint's own dtype, and no codes.
DENSE = frozenset({"fake"})

__all__ = ["DENSE", "FORMATS", "Format", "LinearSpec"]
