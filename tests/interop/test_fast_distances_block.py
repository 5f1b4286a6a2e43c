"""revq.fast_distances: the block and its lazy tensors under modes, threads, compilers and changes in place."""

import threading

import pytest
import torch
from lazy_case import Doubled, lazy, operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import revq


def test_an_operand_changed_in_place_is_detected():
    x, c = operands()
    d = lazy(x, c)
    with torch.no_grad():
        c.mul_(2)
    for use in (lambda d: d.argmin(1), lambda d: d.sum(), lambda d: (-d).max(1)):
        with pytest.raises(RuntimeError, match=r"changed in place between torch\.cdist"):
            use(d)
    d, expected = lazy(x, c), torch.cdist(x, c).argmin(1)
    c.data = torch.zeros_like(c)  # other memory: the lazy matrix keeps the old one
    assert torch.equal(d.argmin(1), expected)


def test_the_block_ends_and_nests():
    x, c = operands()
    with revq.fast_distances() as mode, revq.fast_distances():
        with mode:
            d = torch.cdist(x, c)
        assert torch.cdist(x, c).is_lazy and torch.equal(d.argmin(1), torch.cdist(x, c).clone().argmin(1))
    assert type(torch.cdist(x, c)) is torch.Tensor
    with pytest.raises(KeyError), revq.fast_distances():
        raise KeyError
    assert type(torch.cdist(x, c)) is torch.Tensor
    with revq.fast_distances():
        assert torch.equal(torch.cdist(torch.cdist(x, c), torch.cdist(x, c)) + 0, torch.cdist(d + 0, d + 0) + 0)


def test_the_block_belongs_to_its_thread():
    x, c = operands()
    kinds = []
    with revq.fast_distances():
        thread = threading.Thread(target=lambda: kinds.append(type(torch.cdist(x, c))))
        thread.start()
        thread.join()
    assert kinds == [torch.Tensor]


def test_gradient_mode_is_that_of_the_call():
    x, c = operands()
    with torch.no_grad():
        d, e = lazy(x, c), lazy(x, c)
    assert not d.requires_grad and not d.min(1).values.requires_grad and not d.sum().requires_grad
    assert not e[2].requires_grad
    batched = lazy(x[None], c[None])
    with torch.no_grad():
        row = batched[0]
    assert not row.requires_grad and not row.min(1).values.requires_grad and batched.sum().requires_grad
    d = lazy(x, c)
    assert d.requires_grad and not d.is_leaf
    with torch.no_grad():
        assert not d.min(1).values.requires_grad and not d.sum().requires_grad
    assert d.sum().requires_grad
    d = lazy(x, c)
    with torch.inference_mode():
        d.sum()
    torch.autograd.grad(d.exp().sum(), (x, c))


def test_under_torch_compile():
    x, c = operands()

    def inside(x, c):
        d = torch.cdist(x, c)
        return d.argmin(1), d.min(1).values, d.exp().sum()

    expected = inside(x, c)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    with revq.fast_distances():
        got = compiled(x, c)
        # Lazy tensors as arguments of compiled code: Dynamo must not reuse the code of one torch function for another
        for backend in ("eager", "aot_eager"):
            for use in (lambda d: (d * 2).sum(), lambda d: d.argmin(1)):
                result = torch.compile(use, backend=backend)(torch.cdist(x, c))
                torch.testing.assert_close(result, use(torch.cdist(x, c)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(compiled(x, c), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpointed_function(reentrant):
    def nearest(x):
        with revq.fast_distances():
            return torch.cdist(x, c.detach()).min(1).values.sum()

    x, c = operands()
    expected = torch.autograd.grad(nearest(x), x)[0]
    checkpoint(nearest, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


def test_under_fake_tensors_and_make_fx():
    with FakeTensorMode(), revq.fast_distances():
        assert torch.cdist(torch.empty(30, 4), torch.empty(40, 4)).argmin(1).shape == (30,)
    x, c = torch.randn(30, 4), torch.randn(40, 4)
    with revq.fast_distances():
        graph = make_fx(lambda x, c: torch.cdist(x, c).argmin(1))(x, c)
    y = torch.randn(30, 4)
    assert torch.equal(graph(y, c), torch.cdist(y, c).argmin(1))


def test_backward_through_a_mixture():
    base = torch.randn(30, 4), torch.randn(40, 4)
    found = []
    for mode in (None, revq.fast_distances()):
        x, c = (t.clone().requires_grad_() for t in base)
        if mode is None:
            d = torch.cdist(x, c)
        else:
            with mode:
                d = torch.cdist(x, c)
        nearest = d.min(1).values  # fused
        loss = nearest.sum() + d.softmax(1)[:, 0].sum() + Doubled.apply(d).mean() + (-d).max(0).values.square().sum()
        loss.backward()
        found.append((loss, x.grad, c.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_the_matrix_is_computed_once_and_changes_stay():
    x, c = torch.randn(30, 4), torch.randn(40, 4)
    with revq.fast_distances():
        d = torch.cdist(x, c)
    negative = -d
    d[:, 5] = -1
    assert d.argmin(1).tolist() == [5] * 30, "from then on the questions are about the changed matrix"
    assert torch.equal(negative + 0, -torch.cdist(x, c)), "which the negative, made before, does not see"
    assert d.T.data_ptr() == d.data_ptr()


def test_torchscript_in_place_is_refused():
    @torch.jit.script
    def double(d: torch.Tensor) -> torch.Tensor:
        return d.mul_(2)

    with revq.fast_distances():
        d = torch.cdist(torch.randn(30, 4), torch.randn(40, 4))
    with pytest.raises(RuntimeError, match="failed in the TorchScript interpreter"):  # TorchScript hides our message
        double(d)
    with pytest.raises(RuntimeError, match=r"call .clone\(\) on it first"), torch._C.DisableTorchFunctionSubclass():
        d.mul_(2)
