"""Every format that can be written, by its name."""

from llmquant.formats.awq import AWQ
from llmquant.formats.base import Format
from llmquant.formats.compressed_tensors import CompressedTensors
from llmquant.formats.fake import Fake
from llmquant.formats.gguf import GGUF
from llmquant.formats.gptq import GPTQ
from llmquant.formats.mlx import MLX

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (CompressedTensors(), GPTQ(), AWQ(), MLX(), GGUF(), Fake())}
