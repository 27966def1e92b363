"""Several processes at one run, each with its part of the text: `torchrun --nproc-per-node 8 -m llmquant run ...`.

Every rank goes the same way through the program with the same model, plan and weights. What differs:

    text      batches are dealt out to them one by one
    sums      Hessians are added up in the order of the batches, so that they are what one process finds, to the bit
    solve     each solves its part of the rows or experts of a block, and all get the codes
    writing   the first rank alone writes; the others read what it wrote, so all must see one file system

A run on one process is a run of one rank: nothing here does anything then.

Everything that one rank tells others goes through `Ranks`. Where another one has died, hangs, or has met an error, the
next call raises a RankError, and of all ranks one says why.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from llmquant.errors import RankError, RecipeError, option

if TYPE_CHECKING:  # `llmquant --help` loads no torch
    from torch import Tensor

T = TypeVar("T")
_WORLD = "WORLD_SIZE"  # set by torchrun, as are RANK and LOCAL_RANK
_NOTHING: Any = object()
_ENDED = "llmquant: the first rank that ended with an error"


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them.

    >>> alone = Ranks()
    >>> alone.first, alone.share([1, 2, 3]), alone.gathered("x"), alone.of_first("y")
    (True, [1, 2, 3], ['x'], 'y')
    >>> list(Ranks(1, 3).share(range(7)))
    [1, 4]
    """

    rank: int = 0
    size: int = 1
    by_batch: bool = True  # whether sums are told after every batch, in order, or once (`Sums`)
    objects: Any = None  # the process group over which what is no tensor of a GPU is told

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, and says what happens."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: dealt out one by one, so that a round of all ranks follows the round before."""
        return items[self.rank :: self.size]

    def in_order(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """All items again, of the `share` of every rank.

        >>> Ranks(0, 2).in_order([["a", "c"], ["b"]])
        ['a', 'b', 'c']
        """
        rounds = zip_longest(*shares, fillvalue=_NOTHING)
        return [item for one in rounds for item in one if item is not _NOTHING]

    def gathered(self, value: T) -> list[T]:
        """The `value` of every rank, everywhere; tensors in it should lie on the CPU."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with self._talking() as dist:
            dist.all_gather_object(found, value, group=self.objects)
        return found

    def of_first(self, value: T) -> T:
        """The first rank's `value`, everywhere."""
        if self.alone:
            return value
        found: list[Any] = [value]
        with self._talking() as dist:
            dist.broadcast_object_list(found, src=0, group=self.objects)
        told: T = found[0]
        return told

    def parts_at(self, owner: int, tensor: "Tensor") -> "list[Tensor]":
        """At the rank `owner`, the `tensor` of every rank, in their order; nothing at the others."""
        told, group = self._told(tensor)
        parts = [told.clone() for _ in range(self.size)] if owner == self.rank else None
        with self._talking() as dist:
            dist.gather(told, parts, dst=owner, group=group)
        return [part.to(tensor.device) for part in parts or ()]

    def of_rank(self, owner: int, tensor: "Tensor") -> "Tensor":
        """The `tensor` of the rank `owner`, everywhere; others give one of its shape and dtype."""
        told, group = self._told(tensor)
        with self._talking() as dist:
            dist.broadcast(told, src=owner, group=group)
        return told

    def _told(self, tensor: "Tensor") -> "tuple[Tensor, Any]":
        """A tensor as it goes to other ranks, and the group: only CPUs and GPUs have a way of their own to them."""
        told = (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).contiguous()
        return told, self.objects if told.device.type == "cpu" else None

    def wait(self) -> None:
        """Until every rank is here: what the first one has written can be read behind it."""
        self.gathered(None)

    def send(self, tensor: "Tensor") -> None:
        """A tensor in the machine's memory to the first rank, which must `receive` it."""
        with self._talking() as dist:
            dist.send(tensor, 0, group=self.objects)

    def receive(self, tensor: "Tensor", rank: int) -> "Tensor":
        """Fill `tensor` by what another rank sends."""
        with self._talking() as dist:
            dist.recv(tensor, rank, group=self.objects)
        return tensor

    @contextmanager
    def _talking(self) -> Iterator[Any]:
        """torch.distributed, whose errors are ours."""
        import torch.distributed

        try:
            yield torch.distributed
        except RuntimeError as error:  # what torch raises for a connection that broke or took too long
            got = " ".join(str(error).split())
            got = got.rpartition("] ")[2][:160]  # without the place in torch's own code
            raise RankError(
                f"rank {self.rank} of {self.size}",
                f"another rank has ended or does not answer ({got})",
                remedy="the same command goes on with what is kept",
            ) from None


ALONE = Ranks()


class Sums:
    """Sums over the batches of all ranks. Each rank adds its next batch to `tensors` [rows, ...], and says so by
    `batch`; behind the last one `finish` leaves the totals there, the same on every rank.

    n_rounds   how many batches the rank with most has

    With `Ranks.by_batch`, the batches of a round are added to the totals in the order of the text, which is what one
    process does: the same bits, where a product added to a sum is the same as one that starts from it. Every number
    crosses the network once for each round. Without, each rank adds up its own first, which is another order: the last
    bits differ, and with them many codes, none the worse for it.

    Each rank keeps the totals of a range of the rows.
    """

    def __init__(self, ranks: Ranks, tensors: "Sequence[Tensor]", n_rounds: int) -> None:
        self._ranks, self._tensors, self._left = ranks, [] if ranks.alone else list(tensors), n_rounds
        self._owned = [tensor[self._rows(tensor, ranks.rank)].clone().zero_() for tensor in self._tensors]

    def _rows(self, tensor: "Tensor", rank: int) -> slice:
        return slice(len(tensor) * rank // self._ranks.size, len(tensor) * (rank + 1) // self._ranks.size)

    def batch(self) -> None:
        """A batch of this rank has been added."""
        self._left -= 1
        if self._ranks.by_batch or not self._left:
            self._tell()

    def _tell(self) -> None:
        ranks = self._ranks
        for tensor, owned in zip(self._tensors, self._owned, strict=True):
            for owner in range(ranks.size):
                parts = ranks.parts_at(owner, tensor[self._rows(tensor, owner)])
                for part in parts:  # empty unless this is the owner
                    owned += part
            tensor.zero_()

    def finish(self) -> None:
        """Behind this rank's last batch: the totals of all."""
        while self._left > 0:
            self.batch()
        for tensor, owned in zip(self._tensors, self._owned, strict=True):
            for owner in range(self._ranks.size):
                rows = self._rows(tensor, owner)
                tensor[rows] = self._ranks.of_rank(owner, owned if owner == self._ranks.rank else tensor[rows])


def n_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started for this command; 1 without it."""
    return int(environment.get(_WORLD, 1))


def said_by_another(error: BaseException | None) -> bool:
    """Whether another rank says why all end: the first one that ended; before they have met, rank 0."""
    said = getattr(error, "said", None)
    return bool(said) if said is not None else n_ranks() > 1 and os.environ.get("RANK") != "0"


@contextmanager
def joined(device: str, timeout_minutes: float, *, by_batch: bool = True) -> Iterator[Ranks]:
    """This process among those of torchrun, for the length of a `with`.

    device           as the recipe names it; `cuda` is the GPU with the local number of this rank
    timeout_minutes  how long the others may keep silent
    by_batch         as in `Ranks`

    Of all ranks, the first one that ends with an error says it: the errors of the others are marked as `said`.
    """
    if n_ranks() == 1:
        yield ALONE
        return
    if device.startswith("cuda:"):
        raise RecipeError(option("device"), device, expected="cuda: each rank has the GPU of its local number")
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    wait, on_gpus = timedelta(minutes=timeout_minutes), torch.cuda.is_available() and device in ("auto", "cuda")
    if on_gpus:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise RecipeError(
                f"rank {local} of this machine",
                f"{torch.cuda.device_count()} GPUs",
                expected="one for each rank",
                remedy=f"fewer ranks, or {option('device')} cpu",
            )
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(rendezvous("env://", timeout=wait))
        dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size, timeout=wait)
        objects = dist.new_group(backend="gloo", timeout=wait) if on_gpus else dist.group.WORLD
    except (RuntimeError, ValueError) as error:
        raise RankError("torchrun", f"the ranks do not find each other ({str(error)[:160]})") from None
    try:
        yield Ranks(rank, size, by_batch, objects)
    except BaseException as error:
        error.said = not _ends_first(store, rank)  # type: ignore[attr-defined]
        raise  # and the process ends, by which the others hear of it
    dist.destroy_process_group()


def _ends_first(store: Any, rank: int) -> bool:
    """Whether no other rank has said why all end."""
    try:
        return bool(store.compare_set(_ENDED, "", str(rank)) == str(rank).encode())
    except RuntimeError:  # torchrun, which holds the store, has ended
        return True
