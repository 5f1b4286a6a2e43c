"""Test helpers, public so that any implementation can be tested against the contract: problems and assertions.

`problems` yields inputs that break searches in practice; `assert_same_codes` compares indices with those of the
contract (docs/design.md).  The contract's exact distance D is the float32 distance with every operation rounded in a
fixed order.  This file computes D by numpy and shares no code with the reference.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIMS = (1, 2, 3, 4, 5, 8, 16, 31, 64, 256)


class Problem(NamedTuple):
    """One search: x ``[..., G, d]``, codebook ``[G, K, d]``, and a name for the test's id."""

    name: str
    x: Tensor
    codebook: Tensor


def contract_index(x: Tensor, codebook: Tensor, *, metric: str = "l2", weight: Tensor | None = None) -> Tensor:
    """The index that the contract requires, computed from its definition in numpy: int64 ``[..., G]``."""
    num_groups, _, code_dim = codebook.shape
    queries = x.detach().float().reshape(-1, num_groups, code_dim).numpy()
    codes = codebook.detach().float().numpy()
    weights = None if weight is None else weight.detach().float().reshape(queries.shape).numpy()
    result = np.empty(queries.shape[:2], np.int64)
    with np.errstate(all="ignore"):
        for g in range(num_groups):
            for n in range(queries.shape[0]):
                total = np.zeros(0, np.float32)
                for j in range(code_dim):
                    difference = queries[n, g, j] - codes[g, :, j]
                    term = queries[n, g, j] * codes[g, :, j] if metric == "inner_product" else difference * difference
                    if weights is not None:
                        term = weights[n, g, j] * term
                    total = term if j == 0 else total + term
                if metric == "inner_product":
                    total = -total
                nan = np.flatnonzero(np.isnan(total))
                result[n, g] = nan[0] if nan.size else np.flatnonzero(total == total.min())[0]
    return torch.from_numpy(result).reshape(x.shape[:-1])


def assert_same_codes(indices: Tensor, x: Tensor, codebook: Tensor) -> None:
    """Assert that every index is the one that the contract requires; the message shows the first wrong index."""
    expected = contract_index(x, codebook)
    assert indices.dtype == torch.int64, f"dtype {indices.dtype}"
    assert indices.shape == expected.shape, f"shape {tuple(indices.shape)}, expected {tuple(expected.shape)}"
    wrong = (indices.cpu() != expected).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {expected.numel()} indices differ from the contract; first at {place}: "
            f"got {indices[place].item()}, expected {expected[place].item()}"
        )


def problems(seed: int = 0) -> Iterator[Problem]:
    """The contract suite.

    Sizes that are multiples of SIMD widths, sizes that are not, sizes of 1 and of 0; ties, offsets, mixed magnitudes,
    denormals, NaN and Inf; strides and dtypes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        """Standard normal values from the suite's generator."""
        return torch.randn(*shape, generator=generator)

    for d in DIMS:
        yield Problem(f"gauss-d{d}", normal(33, 2, d), normal(2, 203, d))
    for n, g, k, d in ((1, 1, 1, 1), (1, 1, 1000, 4), (256, 1, 16, 8), (257, 3, 17, 4), (5, 7, 2, 3), (64, 1, 4099, 8)):
        yield Problem(f"shape-N{n}-G{g}-K{k}-d{d}", normal(n, g, d), normal(g, k, d))
    yield Problem("leading-dims", normal(2, 3, 5, 4, 6), normal(4, 50, 6))
    yield Problem("no-leading-dims", normal(3, 4), normal(3, 20, 4))
    yield Problem("empty", normal(0, 3, 4), normal(3, 10, 4))
    yield Problem("empty-inside", normal(4, 0, 3, 4), normal(3, 10, 4))

    codes = normal(2, 60, 4)
    yield Problem("duplicate-codes", normal(50, 2, 4), codes[:, torch.randint(0, 60, (400,), generator=generator)])
    yield Problem("all-equal", normal(20, 1, 4), torch.ones(1, 300, 4))
    yield Problem("queries-are-codes", codes[:, :40].transpose(0, 1), torch.cat([codes, codes], dim=1))
    for d in (1, 2, 4, 8, 31):
        x = torch.randint(-3, 4, (60, 2, d), generator=generator).float()
        yield Problem(f"lattice-d{d}", x, torch.randint(-3, 4, (2, 500, d), generator=generator).float())
    for offset in (1e3, 1e6):
        yield Problem(f"offset-{offset:g}", normal(60, 2, 4) + offset, normal(2, 700, 4) + offset)
    scale = 10.0 ** torch.arange(-18, 18, 3).float()
    mixed = normal(1, 240, 4) * scale.repeat(20)[None, :, None]
    yield Problem("mixed-magnitudes", mixed[0, ::5, None, :] * 1.01, mixed)
    yield Problem("denormal-distances", normal(40, 2, 4) * 1e-20, normal(2, 300, 4) * 1e-20)
    yield Problem("denormal-values", normal(40, 2, 4) * 1e-39, normal(2, 300, 4) * 1e-39)
    yield Problem("overflow", normal(40, 2, 4) * 3e19, normal(2, 300, 4) * 3e19)

    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("-inf", -float("inf"))):
        x, codes = normal(30, 2, 4), normal(2, 100, 4)
        x[::3, 0, 1] = value
        yield Problem(f"query-{name}", x, codes)
        codes = codes.clone()
        codes[:, 40, 2] = value
        codes[0, 90] = value
        yield Problem(f"code-{name}", normal(30, 2, 4), codes)
        yield Problem(f"both-{name}", x, codes)
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    codes = normal(1, 100, 3)
    codes[0, 7, 0] = float("nan")
    codes[0, 5, 0] = negative_nan
    yield Problem("nan-of-either-sign", normal(9, 1, 3), codes)

    yield Problem("transposed", normal(4, 6, 30).permute(2, 1, 0), normal(4, 90, 6).permute(2, 1, 0))
    yield Problem("strided", normal(60, 4, 10)[::2, ::2, 1::3], normal(4, 90, 10)[::2, ::3, 1::3])
    yield Problem("expanded", normal(1, 1, 4).expand(25, 3, 4), normal(1, 90, 4).expand(3, 90, 4))
    yield Problem("channels", normal(2, 8, 3, 3).permute(0, 2, 3, 1).unflatten(3, (2, 4)), normal(2, 90, 4))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Problem(f"{name}", normal(40, 2, 4).to(dtype), normal(2, 300, 4).to(dtype))
        yield Problem(f"{name}-x", normal(40, 2, 4).to(dtype), normal(2, 300, 4))
        yield Problem(f"{name}-codebook", normal(40, 2, 4), normal(2, 300, 4).to(dtype))


def segment_sum_truth(grad: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The codebook gradient in float64, and the largest error that a float32 sum may have: both ``[G, K, d]``.

    This error bound is that of a recursive sum of n terms: (n - 1) * 2^-24 * sum |grad|, with a factor 1.1 for its
    higher orders (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    num_groups, code_dim = grad.shape[-2:]
    rows = indices.reshape(-1, num_groups)
    total = torch.zeros(num_groups, num_codes, code_dim, dtype=torch.float64)
    absolute, chosen = torch.zeros_like(total), torch.zeros(num_groups, num_codes, 1, dtype=torch.float64)
    values = grad.detach().double().reshape(-1, num_groups, code_dim)
    for g in range(num_groups):
        total[g].index_add_(0, rows[:, g], values[:, g])
        absolute[g].index_add_(0, rows[:, g], values[:, g].abs())
        chosen[g].index_add_(0, rows[:, g], torch.ones(len(rows), 1, dtype=torch.float64))
    return total, 1.1 * (chosen - 1).clamp(min=0) * 2.0**-24 * absolute
