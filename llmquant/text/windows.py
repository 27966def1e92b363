"""Text -> fixed token windows, for calibration and for evaluation."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CalibrationError
from llmquant.text.corpus import Text, load_text
from llmquant.text.mixture import parse_mixture, split_samples
from llmquant.text.tokenizer import as_text, leading_bos, tokenize, tokenize_pieces

BATCH_TOKENS = 2048  # that go through a block at once


@dataclass(frozen=True)
class Windows:
    """Token windows ids [n, T] (int64) and how they were made."""

    ids: Tensor
    dataset: str
    revision: str | None
    bos: str  # which windows start with the BOS token: "none", "first" or "every other"

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    def as_dict(self) -> dict[str, Any]:
        """What a report says of them; the digest pins the token ids."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "seq_len": self.ids.shape[1],
            "n_tokens": self.n_tokens,
            "bos": self.bos,
            "ids_sha256": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest(),
        }

    def batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Groups of windows [B, T] of about `tokens` tokens each."""
        return list(torch.split(self.ids, windows_per_batch(self.ids.shape[1], tokens)))


def windows_per_batch(seq_len: int, tokens: int = BATCH_TOKENS) -> int:
    """How many windows of `seq_len` tokens go through a block at once: about `tokens` tokens, one window at least."""
    return max(1, tokens // seq_len)


def check_ids(ids: Tensor, vocab_size: int, where: str) -> None:
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise CalibrationError(
            where,
            f"token id {int(ids.max())}",
            expected=f"ids below the embedding's {vocab_size}",
            remedy="the tokenizer belongs to another model",
        )


def calibration_windows(tokenizer: Any, spec: str, samples: int, seq_len: int, seed: int) -> Windows:
    """`samples` windows of `seq_len` tokens of the text (or a mixture `a:0.5,b:0.5` of texts), chosen by `seed`.

    Windows are drawn without overlap; where the text has room for at least half of them, they are spread evenly
    and overlap. Where the tokenizer starts texts with BOS, so does every other window: models lean on their
    first token, and text from the middle of a document alone would never show it.
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
    # Characters that surely hold enough tokens: eight per token, and twice that to choose from.
    text = load_text(spec, "train", samples * seq_len * 16)
    joined = as_text(tokenizer, text)
    if not joined.strip():
        raise CalibrationError(spec, "no text in it", remedy="choose another --calibration")
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
            remedy="use fewer --samples, a shorter --seq-len or more text",
        )
    return torch.stack([ids[start : start + seq_len] for start in starts]), text


def evaluation_windows(tokenizer: Any, spec: str, max_tokens: int | None, seq_len: int) -> Windows:
    """The GPTQ-style protocol: texts joined by blank lines, one tokenizer call, windows without overlap, no tail.

    At most `max_tokens` tokens (None: the whole text).
    """
    text = load_text(spec, "test", 10**12 if max_tokens is None else max_tokens * 16)
    joined = as_text(tokenizer, text)
    # Six characters a token are nearly always enough, and the ids of a text's head are the head of its ids.
    head = joined if max_tokens is None else joined[: 6 * max_tokens]
    ids = tokenize(tokenizer, head, special=True)
    if max_tokens is not None and ids.numel() < max_tokens + seq_len and len(head) < len(joined):
        ids = tokenize(tokenizer, joined, special=True)
    count = ids.numel() // seq_len
    if max_tokens is not None:
        count = min(count, max_tokens // seq_len)
    if count == 0:
        raise CalibrationError(
            spec, f"{ids.numel()} tokens", expected=f"at least one window of {seq_len}", remedy="more evaluation text"
        )
    bos = leading_bos(tokenizer)
    return Windows(
        ids[: count * seq_len].view(count, seq_len), text.name, text.revision, "none" if bos is None else "first"
    )
