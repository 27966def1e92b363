"""An insurance: the first block and the head, as this program runs them and as stock transformers does.

The two share no code. Here tensors are found, renamed and cut by our rules, and the model is run part by part; there
`from_pretrained` of the same class loads them by its own, and the whole forward runs. The class is built without its
later blocks, so that both compute: embedding, block 0, norm, head. Their logits are equal but for rounding, or every
figure of the run would be about another model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import SourceError
from llmquant.model.classes import opener_of
from llmquant.model.loads import quiet
from llmquant.model.skeleton import Skeleton

TOKENS = 32
# Largest difference of the logits, as a share of their largest size: sums may be taken in another order.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_NOT = "not compared with transformers' own first block"


def compare_with_stock(skeleton: Skeleton, ids: Tensor, limit: int, log: Callable[[str], object]) -> None:
    """SourceError where the logits behind block 0 of a few `ids` [T] are others than those of stock transformers.

    limit   bytes that it may take; a line of the log says where that is too little, or where transformers cannot do it
    """
    if skeleton.parked is not None:
        log(f"{_NOT}: its forwards are parked")
        return
    names = _stored_names(skeleton)
    stored = skeleton.source.as_stored()
    sizes = [stored.tensors[name] for name in names]
    if (needed := sum(info.numel * (info.dtype.itemsize + skeleton.dtype.itemsize) for info in sizes)) > limit:
        log(f"{_NOT}, which would take {needed / 1e9:.1f} GB")
        return
    ids = ids[:TOKENS].reshape(1, -1)
    ours = _ours(skeleton, ids)
    try:
        theirs = _theirs(skeleton, ids, {name: stored.read(name) for name in names})
    except Exception as error:  # what a class raises that was built without most of its blocks
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        log(f"{_NOT}, which it cannot run alone ({brief})")
        return
    if isinstance(pad := getattr(skeleton.model.config.get_text_config(decoder=True), "pad_token_id", None), int):
        ours[:, pad] = theirs[:, pad] = 0  # some classes make the row of padding zero as they load it
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not difference <= _TOLERANCE[skeleton.dtype]:
        raise SourceError(
            skeleton.where,
            f"logits behind its first block differ by {difference:.2g} of their size from those of transformers",
            expected=f"at most {_TOLERANCE[skeleton.dtype]:.0e}",
            remedy="this version does not run that model as it is meant: please report it",
        )


def _stored_names(skeleton: Skeleton) -> list[str]:
    """Tensors of the checkpoint outside of the blocks and in block 0, as they are stored."""
    found: dict[str, None] = {}
    for name, param in skeleton.param_of.items():
        if skeleton.block_of(param) in (None, 0) and not param.startswith(skeleton.idle):
            found |= dict.fromkeys(skeleton.source.made_of(name))
    return list(found)


def _ours(skeleton: Skeleton, ids: Tensor) -> Tensor:
    batch = skeleton.embed(ids)
    with skeleton.blocks[0].loaded() as block, torch.no_grad():
        hidden = block.forward(batch)
    with skeleton.head() as head:
        return head(hidden[0]).cpu()


def _theirs(skeleton: Skeleton, ids: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    opener = opener_of(skeleton.source)
    with quiet(), _first_block_only(opener.cls, skeleton):
        model, info = opener.cls.from_pretrained(
            None, config=opener.settings, state_dict=tensors, dtype=skeleton.dtype, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it leaves {missing[0]} random")
    with torch.no_grad():
        out: Tensor = model.eval().to(skeleton.device)(input_ids=ids.to(skeleton.device), use_cache=False).logits
    return out[0].float().cpu()


@contextmanager
def _first_block_only(cls: Any, skeleton: Skeleton) -> Iterator[None]:
    """`cls` builds models that end behind their first block, without the parts that no text reaches."""
    made = cls.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        del self.get_submodule(skeleton.stack)[1:]
        for path in skeleton.idle:
            parent, _, leaf = path.rstrip(".").rpartition(".")
            if isinstance(getattr(self.get_submodule(parent), leaf, None), nn.Module):
                setattr(self.get_submodule(parent), leaf, nn.Identity())

    cls.__init__ = init
    try:
        yield
    finally:
        cls.__init__ = made
