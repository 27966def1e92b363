"""Text -> windows of a fixed number of tokens, for calibration and for evaluation.

The two differ. Calibration windows are drawn at random (by a seed) and half of them begin with BOS, so that H sees what
the model sees. Evaluation windows follow the published protocol (GPTQ's), so that perplexities can be compared.

Shapes: n windows, B windows of a batch, T tokens of a window.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CalibrationError, option
from llmquant.ranks import Ranks
from llmquant.text.corpus import Text, load_text
from llmquant.text.mixture import parse_mixture, split_samples
from llmquant.text.tokenizer import as_text, leading_bos, tokenize, tokenize_pieces

BATCH_TOKENS = 2048  # tokens that go through a block at once


@dataclass(frozen=True)
class Windows:
    """Token ids [n, T] (int64), and how they were made."""

    ids: Tensor
    dataset: str
    revision: str | None
    bos: str  # which windows start with the BOS token: "none", "first" or "every other"

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    def as_dict(self) -> dict[str, Any]:
        """What a report says of these windows; the digest pins the token ids."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "seq_len": self.ids.shape[1],
            "n_tokens": self.n_tokens,
            "bos": self.bos,
            "ids_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
        }

    def batches(self) -> list[Tensor]:
        """Groups of windows [B, T]."""
        return list(torch.split(self.ids, self.per_batch)) if len(self.ids) else []

    def behind(self, scored: "Windows") -> "Windows":
        """Those behind the ones that were `scored` of them, the first."""
        return replace(self, ids=self.ids[len(scored.ids) :])

    @property
    def per_batch(self) -> int:
        """Windows of a batch."""
        return windows_per_batch(self.ids.shape[1])

    def share_of(self, ranks: Ranks) -> "Windows":
        """The windows in this rank's part of the batches, which are the same batches as without ranks."""
        return replace(self, ids=torch.cat([self.ids[:0], *ranks.share(self.batches())]))


def windows_per_batch(seq_len: int, tokens: int = BATCH_TOKENS) -> int:
    """How many windows of `seq_len` tokens go through a block at once: about `tokens` tokens, at least one window.

    >>> windows_per_batch(512), windows_per_batch(4096)
    (4, 1)
    """
    return max(1, tokens // seq_len)


def check_ids(ids: Tensor, vocab_size: int, where: str) -> None:
    """CalibrationError for a token id that the embedding has no row for."""
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise CalibrationError(
            where,
            f"token id {int(ids.max())}",
            expected=f"ids below the embedding's {vocab_size}",
            remedy="the tokenizer belongs to another model",
        )


def calibration_windows(tokenizer: Any, spec: str, samples: int, seq_len: int, seed: int) -> Windows:
    """`samples` windows of `seq_len` tokens of a text, or of a mixture `a:0.5,b:0.5` of texts, chosen by `seed`.

    Windows do not overlap if the text is long enough. If it has room for half of them at least, they are spread evenly
    and overlap. If it is shorter, that is a CalibrationError.

    Every other window begins with BOS, if the tokenizer begins texts with it. Models pay much attention to their first
    token, and windows from the middle of documents would never show it.
    """
    parts = parse_mixture(spec)
    counts = split_samples(parts, samples)
    drawn = [_draw(tokenizer, name, n, seq_len, seed) for (name, _), n in zip(parts, counts, strict=True)]
    windows = torch.cat([ids for ids, _ in drawn])
    bos = leading_bos(tokenizer)
    if bos is not None:
        windows[::2, 1:] = windows[::2, :-1].clone()
        windows[::2, 0] = bos
    revisions = [text.revision for _, text in drawn]
    return Windows(
        windows,
        drawn[0][1].name
        if len(drawn) == 1
        else ",".join(f"{t.name}:{n}" for (_, t), n in zip(drawn, counts, strict=True)),
        ",".join(map(str, revisions)) if any(revisions) else None,
        "none" if bos is None else "every other",
    )


def _draw(tokenizer: Any, spec: str, samples: int, seq_len: int, seed: int) -> tuple[Tensor, Text]:
    """Windows [samples, T] of one text."""
    # Enough characters: eight for each token are surely enough, and twice that leaves something to choose from.
    text = load_text(spec, "train", samples * seq_len * 16)
    joined = as_text(tokenizer, text)
    if not joined.strip():
        raise CalibrationError(
            spec, "no text in it", remedy=f"choose another {option('calibration')}", field="calibration"
        )
    ids = tokenize_pieces(tokenizer, joined)
    n_slots, enough = ids.numel() // seq_len, max(seq_len + 1, samples * seq_len // 2)
    if n_slots >= samples:
        starts = sorted(slot * seq_len for slot in random.Random(seed).sample(range(n_slots), samples))
    elif ids.numel() >= enough:
        starts = [int(x) for x in torch.linspace(0, ids.numel() - seq_len, samples, dtype=torch.float64)]
    else:
        raise CalibrationError(
            spec,
            f"{ids.numel()} tokens",
            expected=f"at least {enough} for {samples} windows of {seq_len}",
            remedy=f"use fewer {option('samples')}, a shorter {option('seq_len')} or more text",
            field="calibration",
        )
    return torch.stack([ids[start : start + seq_len] for start in starts]), text


def evaluation_windows(tokenizer: Any, spec: str, max_tokens: int | None, seq_len: int) -> Windows:
    """Windows by GPTQ's protocol: texts joined by blank lines, one call of the tokenizer, no overlap, the rest dropped.

    At most `max_tokens` tokens (None: the whole text). CalibrationError where there is not one whole window.
    """
    text = load_text(spec, "test", 10**12 if max_tokens is None else max_tokens * 16)
    joined = as_text(tokenizer, text)
    # Six characters per token are nearly always enough; if not, the whole text is tokenized. Tokenizing the beginning
    # of a text gives the beginning of its ids, but for the last few, which are left over.
    head = joined if max_tokens is None else joined[: 6 * max_tokens]
    ids = tokenize(tokenizer, head, special=True)
    if max_tokens is not None and ids.numel() < max_tokens + seq_len and len(head) < len(joined):
        ids = tokenize(tokenizer, joined, special=True)
    count = ids.numel() // seq_len
    if max_tokens is not None:
        count = min(count, max_tokens // seq_len)
    if count == 0:
        raise CalibrationError(
            spec,
            f"{ids.numel()} tokens",
            expected=f"at least one window of {seq_len}",
            remedy="more evaluation text",
            field="eval_data",
        )
    bos = leading_bos(tokenizer)
    return Windows(
        ids[: count * seq_len].view(count, seq_len), text.name, text.revision, "none" if bos is None else "first"
    )
