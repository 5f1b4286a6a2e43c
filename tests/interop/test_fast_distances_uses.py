"""All other uses of a lazy distance matrix give the results of torch.cdist."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from lazy_case import Doubled

import revq


@torch.jit.script
def scripted(d: torch.Tensor) -> torch.Tensor:
    return d.exp().sum(1)


def graphless(d):
    """The lazy tensor without a gradient; itself if it has none."""
    return d.detach() if d.requires_grad else d


def in_place(d):
    d += 1
    d.mul_(2)
    d[0] = 7
    return d


def through_numpy(d):
    graphless(d).numpy()[0, 0] = 7
    return d.detach()


def saved(d):
    buffer = io.BytesIO()
    torch.save(graphless(d), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def out(d):
    result = torch.empty(d.shape)
    with torch.no_grad():
        torch.add(d, 1, out=result)
    return result


USES = {
    "arithmetic": lambda d: 2 * d**2 - d / 3 + (1 - d),
    "square": lambda d: d.pow(2).argmin(1),
    "indexing": lambda d: (d[3], d[:, 2:5], d[d > 2], d[..., None], d[torch.arange(4), torch.arange(4)]),
    "softmax": lambda d: (-d).softmax(dim=-1),
    "sum": lambda d: (d.sum(), d.sum(1), d.mean(0), torch.logsumexp(d, 1)),
    "comparison": lambda d: (d < 2, d == d, torch.isclose(d, d), torch.equal(d, d)),
    "to": lambda d: (d.to(torch.float64), d.half(), d.to("cpu"), d.type(torch.float16)),
    "metadata": lambda d: (
        d.shape,
        d.size(1),
        d.dtype,
        d.device,
        d.ndim,
        d.numel(),
        len(d),
        d.requires_grad,
        d.is_leaf,
    ),
    "layout": lambda d: (d.stride(), d.is_contiguous(), d.layout, d.storage_offset(), d.nbytes),
    "reshape": lambda d: (d.reshape(-1), d.view(2, -1), d.T, d.unsqueeze(0), d.permute(1, 0), d.flatten()),
    "topk": lambda d: (*d.topk(5), *d.topk(k=5, largest=False), *torch.topk(d, 1), *d.sort(dim=1)),
    "min-without-dim": lambda d: (d.min(), torch.min(d), d.argmin(), d.max(), d.max(1), d.argmax(1), d.amin(1)),
    "min-of-two": lambda d: (torch.min(d, torch.ones(())), torch.minimum(d, d.detach()), torch.max(d, other=d)),
    "farthest-of-negative": lambda d: ((-d).min(1).indices, (-d).argmin(0), (-d).topk(1, largest=False).values),
    "elementwise": lambda d: (d.sqrt(), d.exp(), torch.log(d), d.clamp(min=1), torch.nn.functional.relu(d)),
    "matmul": lambda d: (d @ d.T, torch.einsum("nk,mk->nm", d, d), torch.nn.functional.linear(d, d)),
    "printing": lambda d: (repr(d), str(graphless(d)), f"{d.sum():.3f}"),
    "numpy": lambda d: (graphless(d).numpy(), np.asarray(graphless(d)), d.tolist(), d[0, 0].item()),
    "numpy-write": through_numpy,
    "in-place": in_place,
    "out": out,
    "where": lambda d: (torch.where(d > 2, d, 0.0), d.masked_fill(d > 2, 9), torch.gather(d, 1, d.argmin(1)[:, None])),
    "cat": lambda d: (torch.cat([d, d]), torch.stack((d, -d)), torch.block_diag(d, d)),
    "copies": lambda d: (d.clone(), d.detach(), d.contiguous(), copy.deepcopy(graphless(d)), copy.copy(d)),
    "iteration": lambda d: (list(d), [row.sum() for row in d], d.unbind(1), 2.0 in d),
    "pickle": lambda d: (pickle.loads(pickle.dumps(graphless(d))), saved(d)),
    "dlpack": lambda d: torch.from_dlpack(graphless(d)),
    "constructors": lambda d: (torch.zeros_like(d), d.new_ones(2), torch.as_tensor(d), torch.is_tensor(d)),
    "operators": lambda d: (torch.ops.aten.add(d, 1), torch.ops.aten.argmin.default(d, 1)),
    "autograd-function": lambda d: Doubled.apply(d),
    "torchscript": scripted,
    "grad-of-it": lambda d: torch.autograd.grad((d * 3).sum(), d)[0],
}


def tensors(result) -> list:
    """The results of a use as a flat list, with arrays as tensors."""
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in tensors(part)]
    return [torch.from_numpy(result) if isinstance(result, np.ndarray) else result]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "inference"])
@pytest.mark.parametrize("name", USES)
def test_use(name, grad):
    if name == ("in-place" if grad else "grad-of-it"):
        pytest.skip("torch.cdist's own gradient refuses it" if grad else "needs a gradient")
    results, gradients = [], []
    base = torch.randn(30, 4), torch.randn(40, 4)
    for mode in (None, revq.fast_distances()):
        x, c = (t.clone().requires_grad_(grad) for t in base)
        with torch.inference_mode(not grad):
            if mode is None:
                d = torch.cdist(x, c)
            else:
                with mode:
                    d = torch.cdist(x, c)
                assert d.is_lazy
            found = tensors(USES[name](d))
        results.append(found)
        total = sum(t.double().sum() for t in found if isinstance(t, torch.Tensor) and t.requires_grad)
        if isinstance(total, torch.Tensor):
            gradients.append(torch.autograd.grad(total, (x, c)))
        if name == "metadata" and mode:
            assert d.is_lazy
    for expected, got in zip(*results, strict=True):
        assert isinstance(got, type(expected))
        if isinstance(expected, torch.Tensor):
            assert got.dtype == expected.dtype and got.requires_grad == expected.requires_grad
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == expected
    assert len(gradients) in (0, 2)
    for expected, got in zip(*gradients, strict=True) if gradients else ():
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
