"""GPTQModel's GPTQ, with its defaults: PYTHONPATH=. python eval/peers/run_gptqmodel.py --model demo

Symmetric; the GPTQ format stores a constant zero point per group all the same, and it is counted.
"""

import os
import tempfile

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", str(os.cpu_count())
)  # its default starts more workers than a small CPU has

from common import Job, main, option_parser, read_gptq
from gptqmodel import GPTQModel, QuantizeConfig
from torch import Tensor


def quantize(job: Job) -> dict[str, Tensor]:
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.ids.tolist()]
    config = QuantizeConfig(bits=job.options.bits, group_size=job.options.group_size)
    model = GPTQModel.load(str(job.source.folder), config, device=job.device)
    with job.timed():
        model.quantize(rows, batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return read_gptq(folder, job.options.bits)


if __name__ == "__main__":
    main("gptqmodel", quantize, option_parser(__doc__, "gptqmodel"), zero_bits=lambda bits: bits)
