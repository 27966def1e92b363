"""Forwards that pause at a module and go on with what the weights have become."""

import pytest
import torch
from torch import Tensor, nn

from llmquant.model.paused import Paused, pausing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden
        hidden = torch.relu(self.one(hidden))
        hidden = residual + self.two(hidden)
        return self.three(hidden) + hidden


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def test_a_paused_forward_gives_every_input_and_the_whole_output(block: Block) -> None:
    x = torch.randn(5, 8)
    with torch.no_grad():
        whole = block(x)
        after_one = torch.relu(block.one(x))
    with pausing([block.one, block.two, block.three]):
        run = Paused(lambda: block(x))
        assert torch.equal(run.input_of(0), x)
        assert torch.equal(run.input_of(1), after_one)
        assert torch.equal(run.finish(), whole)
    assert torch.is_grad_enabled()


def test_many_forwards_wait_side_by_side_and_see_the_weights_of_their_next_part(block: Block) -> None:
    batches = [torch.randn(3, 8) for _ in range(20)]
    with pausing([block.one, block.two]):
        runs = [Paused(lambda x=x: block(x)) for x in batches]  # type: ignore[misc]
        for run in runs:
            run.input_of(0)
        block.one.weight.data *= 2
        seen = [run.input_of(1) for run in runs]
        block.two.weight.data *= 3
        outputs = [run.finish() for run in runs]
    with torch.no_grad():
        for x, middle, output in zip(batches, seen, outputs, strict=True):
            assert torch.equal(middle, torch.relu(block.one(x)))
            assert torch.equal(output, block(x))


def test_steps_may_be_passed_over(block: Block) -> None:
    x = torch.randn(2, 8)
    with pausing([block.one, block.two, block.three]):
        run = Paused(lambda: block(x))
        with torch.no_grad():
            expected = x + block.two(torch.relu(block.one(x)))
        assert torch.equal(run.input_of(2), expected)
        run.close()


def test_a_step_behind_the_forward_is_an_error_and_one_inside_it_reaches_the_caller(block: Block) -> None:
    def broken() -> Tensor:
        block.one(torch.randn(2, 8))
        raise ZeroDivisionError

    with pausing([block.one, block.two]):
        run = Paused(lambda: block(torch.randn(2, 8)))
        run.input_of(1)
        with pytest.raises(RuntimeError, match="ended before step 0"):
            run.input_of(0)
        failing = Paused(broken)
        failing.input_of(0)
        with pytest.raises(ZeroDivisionError):
            failing.finish()


def test_what_a_paused_forward_holds_is_counted_without_parameters(block: Block) -> None:
    x = torch.randn(1000, 8)
    with pausing([block.two]):
        run = Paused(lambda: block(x))
        run.input_of(0)
        tensor = x.numel() * 4
        assert 2 * tensor <= run.held_bytes() <= 4 * tensor  # x, which is the residual, and the input; no weights
        run.close()
        assert run.held_bytes() == 0


def test_plain_forwards_do_not_pause(block: Block) -> None:
    x = torch.randn(2, 8)
    with pausing([block.one, block.two]):
        assert block(x).shape == (2, 8)
