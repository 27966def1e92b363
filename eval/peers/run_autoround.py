"""AutoRound (signed gradient descent): PYTHONPATH=. python eval/peers/run_autoround.py --model demo [--iters 200]

Symmetric; written in the GPTQ format, whose constant zero point per group is counted.
"""

import tempfile

from auto_round import AutoRound
from common import Job, main, option_parser, read_gptq
from torch import Tensor


def quantize(job: Job) -> dict[str, Tensor]:
    n_windows, seq_len = job.ids.shape
    rounder = AutoRound(
        job.load(),
        job.tokenizer,
        bits=job.options.bits,
        group_size=job.options.group_size,
        sym=True,
        dataset=[row[None] for row in job.ids],
        nsamples=n_windows,
        seqlen=seq_len,
        iters=job.options.iters,
        batch_size=8,
        device_map=job.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        with job.timed():
            rounder.quantize_and_save(folder, format="auto_gptq")
        return read_gptq(folder, job.options.bits)


if __name__ == "__main__":
    parser = option_parser(__doc__, "autoround")
    parser.add_argument("--iters", type=int, default=200, help="steps per block; 200 is its default")
    main("autoround", quantize, parser, zero_bits=lambda bits: bits)
