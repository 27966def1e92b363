"""Every model type of transformers passes or is refused in one line; none crashes, and none is quietly wrong.

The quick tests take one type of each mechanism. `pytest -m soak` takes all of them, and compares with the table that
`python eval/model_types.py --write` makes.
"""

from pathlib import Path

import pytest
import transformers
from contract import table
from contract.build import types, variants
from contract.check import Outcome, check
from contract.uploads import UPLOADS

MECHANISMS = {
    "dense": "llama",
    "experts, one tensor each on disk": "qwen3_moe",
    "experts, fused on disk": "llama4_text",
    "hybrid": "qwen3_5_text",
    "multimodal": "llava",
    "multimodal with experts": "deepseek_ocr2",
    "state shared between blocks": "gemma4_text",
    "tensors merged while loading": "bailing_hybrid",
    "Conv1D": "gpt2",
}
VERSION, KNOWN = table.load()
ALL = [*types(), *variants(), *UPLOADS]


def judge(name: str, folder: Path) -> Outcome:
    outcome = check(name, folder)
    assert not outcome.is_bug, outcome
    if name in KNOWN and transformers.__version__ == VERSION:
        assert outcome.result == KNOWN[name]["result"], outcome
    return outcome


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_type_of_each_mechanism(mechanism: str, tmp_path: Path) -> None:
    judge(MECHANISMS[mechanism], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
def test_type(name: str, tmp_path: Path) -> None:
    judge(name, tmp_path)
