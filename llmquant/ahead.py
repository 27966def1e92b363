"""Work on several items at once, with the results in order: reads and hashes, which wait for a disk or hold no lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def n_workers() -> int:
    """Threads for it: half of those that torch computes with, at most 4. One item may fill much memory."""
    return max(1, min(_MOST, torch.get_num_threads() // 2))


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, with `n_workers()` of them under way. The first error is raised.

    >>> list(ahead(len, ["a", "bb", ""]))
    [1, 2, 0]
    """
    if (n := n_workers()) == 1:
        yield from map(function, items)
        return
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n, thread_name_prefix="llmquant-ahead") as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == n:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
