"""HQQ, which needs no calibration: PYTHONPATH=. python eval/peers/run_hqq.py --model demo

Asymmetric; scales and zero points are floats, kept in float16 as HQQLinear keeps them. Groups lie along the inputs
(axis 1), as its fast kernels need them.
"""

import torch
from common import Job, linears, main, option_parser
from hqq.core.quantize import Quantizer
from torch import Tensor


def quantize(job: Job) -> dict[str, Tensor]:
    bits, group = job.options.bits, job.options.group_size
    weights = {}
    model = job.load(torch.float32)
    with job.timed(), torch.no_grad():
        for name, linear in linears(model).items():
            size = linear.in_features if group == -1 else group
            codes, meta = Quantizer.quantize(linear.weight, nbits=bits, group_size=size, axis=1, device=job.device)
            meta |= {part: meta[part].half().float() for part in ("scale", "zero")}
            weights[name] = Quantizer.dequantize(codes, meta).float().view_as(linear.weight).cpu()
    return weights


if __name__ == "__main__":
    main("hqq", quantize, option_parser(__doc__, "hqq"), zero_bits=lambda bits: 16)
