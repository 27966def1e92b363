"""llm-compressor's GPTQ, with its defaults: PYTHONPATH=. python eval/peers/run_llmcompressor.py --model demo

Symmetric groups of --group-size at --bits 2 to 8; 4 and 128 are its scheme W4A16. In a mixture of experts it takes all
tokens through all experts, its default; with --routed an expert is calibrated on the tokens that the router sends it.
"""

import tempfile

from common import Job, main, option_parser
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import GPTQModifier
from torch import Tensor

from llmquant.checkpoint import PackedSource, open_checkpoint


def quantize(job: Job) -> dict[str, Tensor]:
    group = job.options.group_size
    grid = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    args = QuantizationArgs(num_bits=job.options.bits, type="int", symmetric=True, **grid)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    ids = job.ids.tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model = job.load()
    linearize_moe(model)  # its `load_quantizable_moe` needs a torchvision that fits torch
    with job.timed():
        oneshot(
            model=model,
            tokenizer=job.tokenizer,
            dataset=dataset,
            recipe=[recipe],
            max_seq_length=job.ids.shape[1],
            num_calibration_samples=len(ids),
            moe_calibrate_all_experts=not job.options.routed,
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        stored = open_checkpoint(folder)
        assert isinstance(stored, PackedSource)
        return {name: stored.read(name) for name in stored.packed}


if __name__ == "__main__":
    parser = option_parser(__doc__, "llmcompressor")
    parser.add_argument("--routed", action="store_true", help="experts see only the tokens that are routed to them")
    main("llmcompressor", quantize, parser)
