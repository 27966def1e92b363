"""The pretend device does what an accelerator does and refuses what an accelerator refuses."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pretend_device import on_pretend_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

# x: [3, 3] on the device; c: [3, 3] on the CPU
REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda x, c: x + c,
    "product": lambda x, c: c @ x,
    "linear": lambda x, c: linear(c, x),
    "cat": lambda x, c: torch.cat([x, c]),
    "where": lambda x, c: torch.where(x > 0, c, x),
    "out": lambda x, c: torch.add(x, x, out=c),
    "in place, on the CPU": lambda x, c: c.add_(x),
    "in place, on the device": lambda x, c: x.add_(c),
    "a scalar of the CPU is written": lambda x, c: c[0, 0].add_(x[0, 0]),
    "index on the CPU": lambda x, c: x[torch.tensor([0, 1])],
    "index on the device": lambda x, c: c[torch.tensor([0, 1], device=x.device)],
    "numpy": lambda x, c: x.numpy(),
    "asarray": lambda x, c: np.asarray(x),
    "memoryview": lambda x, c: memoryview(x),  # type: ignore[arg-type]
    "data_ptr": lambda x, c: x.data_ptr(),
    "data_ptr of a view": lambda x, c: x[0].data_ptr(),
    "data_ptr of a parameter": lambda x, c: nn.Parameter(x).data_ptr(),
    "float64": lambda x, c: x.double(),
    "another shape in place": lambda x, c: x.resize_(20),
    "a resized out": lambda x, c: torch.add(x, x, out=torch.empty(0, device=x.device)),
}


@on_pretend_device
def test_what_an_accelerator_refuses_is_an_error() -> None:
    for name, refused in REFUSED.items():
        x, c = torch.ones(3, 3, device="pretend"), torch.ones(3, 3)
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            print(name, refused(x, c))


@on_pretend_device
def test_the_message_names_the_operator_and_the_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"aten\.mul\.Tensor: other \(2, 3\) is on cpu, others on pretend"):
        torch.ones(2, 3, device="pretend") * torch.ones(2, 3)


@on_pretend_device
def test_moves() -> None:
    c = torch.randn(2, 3)
    x = c.to("pretend")
    assert (x.device, x.dtype, tuple(x.shape)) == (torch.device("pretend", 0), torch.float32, (2, 3))
    assert x.to("pretend") is x
    assert x.to("pretend:0", torch.float32) is x
    assert type(x.cpu()) is type(x.to("cpu", copy=True)) is Tensor
    assert torch.equal(x.cpu(), c)
    assert torch.equal(x.to("cpu", torch.bfloat16), c.bfloat16())
    assert x.bfloat16().device == x.device
    assert torch.equal(torch.empty(2, 3).copy_(x), c)
    assert torch.equal(torch.empty(2, 3, device="pretend").copy_(c).cpu(), c)
    x[0] = torch.tensor([7.0, 8.0, 9.0])  # a copy, as on every device
    c[1] = x[0]
    assert x.tolist()[0] == c.tolist()[1] == [7, 8, 9]
    assert torch.equal(c[0], torch.from_numpy(c.numpy())[0])  # the CPU goes on as ever
    assert torch.empty_like(x, device="meta").device.type == "meta"


@on_pretend_device
def test_factories() -> None:
    made = {
        "zeros": torch.zeros(3, device="pretend"),
        "full": torch.full((3,), 2.0, device="pretend"),
        "arange": torch.arange(3, device=torch.device("pretend")),
        "tensor": torch.tensor([1.0, 2.0], device="pretend"),
        "eye": torch.eye(3, device="pretend"),
        "empty": torch.empty((), dtype=torch.int32, device="pretend"),
        "randint": torch.randint(3, (3,), device="pretend"),
        "like": torch.zeros_like(torch.ones(2), device="pretend"),
        "new": torch.zeros(3, device="pretend").new_ones(2),
    }
    assert {name: x.device.type for name, x in made.items()} == dict.fromkeys(made, "pretend")
    assert made["arange"].tolist() == [0, 1, 2]
    assert made["tensor"].tolist() == [1, 2]


@on_pretend_device
def test_scalars_of_the_cpu_may_be_read_and_scalars_of_the_device_too() -> None:
    x = torch.tensor([1.0, 2.0], device="pretend")
    assert (x * torch.tensor(2.0)).tolist() == (torch.tensor(2.0) * x).tolist() == [2, 4]
    assert torch.where(x > 1, x, 0).tolist() == [0, 2]
    assert (x.sum().item(), float(x[1]), int(x.argmax()), bool((x > 0).all())) == (3.0, 2.0, 1, True)
    assert torch.equal(x, x.clone())


@on_pretend_device
def test_views_share_memory_and_writes_through_them_are_seen() -> None:
    x = torch.zeros(4, 3, device="pretend")
    order = torch.tensor([2, 0], device="pretend")
    for view in (x.view(-1), x.T, x[1:], x[2], x.detach(), nn.Parameter(x, requires_grad=False)):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert x.clone().untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert x.untyped_storage().nbytes() == 48
    x[1].fill_(1)
    x.T[2].add_(5)
    x[:, 0].view(2, 2)[1].mul_(0).sub_(1)
    torch.sub(x[3], 1, out=x[3])
    assert x.tolist() == [[0, 0, 5], [1, 1, 6], [-1, 0, 5], [-2, -1, 4]]
    x[order] = 9
    x[:, order] = torch.zeros(4, 2, device="pretend")
    assert x.tolist() == [[0, 9, 0], [0, 1, 0], [0, 9, 0], [0, -1, 0]]
    assert x[order].tolist() == [[0, 9, 0], [0, 9, 0]]


@on_pretend_device
def test_versions_count_writes_to_a_tensor_and_its_views() -> None:
    with torch.no_grad():
        x = torch.zeros(4, 3, device="pretend")
        before, view = x._version, x[0]
        view.add_(1)
        x.mul_(2)
        assert x._version == view._version == before + 2


@on_pretend_device
def test_parameters_and_buffers_of_modules() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    x = torch.randn(2, 4)
    wanted = module(x)
    weight = module[0].weight.detach().clone()
    module[0].register_buffer("table", torch.ones(3))
    with torch.no_grad():
        module.to("pretend")
        assert {p.device.type for p in module.state_dict().values()} == {"pretend"}
        assert torch.equal(module(x.to("pretend")).cpu(), wanted)
        with pytest.raises(RuntimeError, match="is on cpu"):
            module(x)
        module[0]._parameters["weight"] = nn.Parameter(torch.ones(3, 4, device="pretend"), requires_grad=False)
        assert isinstance(module[0].weight, nn.Parameter)
        module[0]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)  # what a resumed run did
        with pytest.raises(RuntimeError, match="is on cpu"):
            module(x.to("pretend"))


@on_pretend_device
def test_linear_algebra() -> None:
    x = torch.randn(8, 8)
    h = (x @ x.T + torch.eye(8)).to("pretend")
    work, info = h.clone(), torch.empty((), dtype=torch.int32, device="pretend")
    lower = work.mT
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    assert info.item() == 0
    assert torch.equal(work.cpu(), torch.linalg.cholesky(h.cpu()).mT)
    half = torch.linalg.solve_triangular(lower, h, upper=False)
    assert torch.equal(half.cpu(), torch.linalg.solve_triangular(lower.cpu(), h.cpu(), upper=False))
    assert torch.equal(linear(h, h).cpu(), linear(h.cpu(), h.cpu()))


@on_pretend_device
def test_attention_is_that_of_the_cpu_where_both_take_the_same_kernel() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        wanted = scaled_dot_product_attention(q, k, v, is_causal=True)
        found = scaled_dot_product_attention(*(x.to("pretend") for x in (q, k, v)), is_causal=True)
    assert torch.equal(found.cpu(), wanted)


@on_pretend_device
def test_autocast_of_the_cpu_leaves_it_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        x = torch.ones(2, 2, device="pretend")
        assert (x @ x).dtype == torch.float32


@on_pretend_device
def test_it_is_the_accelerator_of_its_process() -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("pretend")
    assert torch.get_device_module("pretend").device_count() == 1


def test_other_tests_of_the_process_see_nothing_of_it() -> None:
    assert not hasattr(Tensor, "is_pretend")
    with pytest.raises(RuntimeError, match="device type"):
        torch.device("pretend")


def test_failures_come_back() -> None:
    @on_pretend_device
    def fails(word: str) -> None:
        raise ValueError(f"a {word}")

    @on_pretend_device
    def dies() -> None:
        os._exit(3)

    with pytest.raises(AssertionError, match="ValueError: a word"):
        fails("word")
    with pytest.raises(AssertionError, match="status"):
        dies()
