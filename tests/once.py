"""What hundreds of runs do alike and no test looks at, done once or left out: `once` here, or in a child process."""

import os
from typing import Any

import pytest
from torch import Tensor

from llmquant.report import plots
from llmquant.run_dir.disk import Disk
from llmquant.text import windows

DRAW = plots._svg


def once(patch: pytest.MonkeyPatch) -> None:
    """Pages come without their dozen of drawings (the fixture `drawn` has them made); the built-in text, a whole
    book, is cut into tokens once for each tokenizer; and fsync waits for no disk, as no test cuts the power."""
    tokenize, known = windows.tokenize_pieces, dict[tuple[str, str], Tensor]()

    def tokens(tokenizer: Any, text: str) -> Tensor:
        if not hasattr(tokenizer, "backend_tokenizer"):
            return tokenize(tokenizer, text)
        key = tokenizer.backend_tokenizer.to_str(), text
        if key not in known:
            known[key] = tokenize(tokenizer, text)
        return known[key].clone()

    def fsync(self: Disk, fd: int) -> None:
        os.fstat(fd)

    patch.setattr(windows, "tokenize_pieces", tokens)
    patch.setattr(plots, "_svg", lambda name, draw: f'<svg id="{name}"></svg>')
    patch.setattr(Disk, "fsync", fsync)
