"""Items are worked on at once, and their results come in order."""

import threading
import time

import pytest
import torch

from llmquant import ahead as module
from llmquant.ahead import ahead, n_workers


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "n_workers", lambda: 4)


@pytest.mark.usefixtures("four")
def test_results_come_in_order_and_at_most_four_are_under_way() -> None:
    under_way, most, lock = set[int](), [0], threading.Lock()

    def work(item: int) -> int:
        with lock:
            under_way.add(item)
            most.append(len(under_way))
        time.sleep(0.002 * (item % 3))
        with lock:
            under_way.discard(item)
        return item * item

    assert list(ahead(work, range(30))) == [item * item for item in range(30)]
    assert 1 < max(most) <= 4


@pytest.mark.usefixtures("four")
def test_the_first_error_is_raised_and_later_items_are_not_begun() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="5"):
        list(ahead(work, range(1000)))
    assert max(begun) < 20


def test_half_of_the_threads_at_most_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, wanted in ((1, 1), (2, 1), (4, 2), (64, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert n_workers() == wanted
