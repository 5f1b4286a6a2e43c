"""Attacks on the bound of the first pass: no code's score exceeds the limit of its own distance (docs/kernels.md).

`margins` gives limit(distance) - score for every query and code; a negative one is a counterexample.
"""

import numpy as np
import pytest
import torch

dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")

CLONES = [
    *((isa, False) for isa in range(min(dev.cpu_isa(), 2) + 1)),
    *((isa, True) for isa in range(dev.cpu_isa() + 1) if dev.has_int16(isa)),
]
"""Instruction set, and whether the first pass rounds to int16."""
TRIALS = 150
LONGEST = 4096.0
"""Vectors of int16 are scaled to this length, or, every third time, to the greatest that is allowed."""


def contract_distance(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Exact distances, ``[n, K]``."""
    total = np.zeros((len(x), len(codes)), np.float32)
    for j in range(x.shape[1]):
        difference = x[:, None, j] - codes[None, :, j]
        total = total + difference * difference
    return total


def random_exponents(rng, n, k, d):
    scale = 2.0 ** rng.integers(-20, 20, d)
    return scale * rng.standard_normal((n, d)), scale * rng.standard_normal((k, d))


def near_ties(rng, n, k, d):
    """Queries and codes all around one point, and mirrored through it."""
    point, spread = rng.standard_normal(d), 2.0 ** rng.uniform(-20, -2)
    codes = point + spread * rng.standard_normal((k, d))
    codes[k // 2 :] = 2 * point - codes[: k - k // 2]
    return point + 0.1 * spread * rng.standard_normal((n, d)), codes


def powers_of_two(rng, n, k, d):
    """Values at and beside powers of two, where the unit of rounding changes."""

    def values(rows):
        return (
            2.0 ** rng.integers(-4, 5, (rows, d))
            * rng.choice([-1, 1], (rows, d))
            * (1 + rng.integers(-2, 3, (rows, d)) * 2.0**-24)
        )

    return values(n), values(k)


def canceling(rng, n, k, d):
    """x'.c' is a small sum of large products."""
    x, codes = rng.standard_normal((n, d)), rng.standard_normal((k, d))
    half = d // 2
    x[:, half : 2 * half] = x[:, :half]
    codes[:, half : 2 * half] = -codes[:, :half] * (1 + 2.0**-20 * rng.standard_normal((k, half)))
    return x, codes


def swamped(rng, n, k, d):
    """One large element, then many products that are each rounded away: errors that all have one sign."""
    small = np.sqrt(rng.uniform(0.2, 0.999, (k, 1)) * 2.0**-25)
    codes = np.concatenate([1 + rng.uniform(0, 2.0**-12, (k, 1)), np.repeat(small, d - 1, 1)], axis=1)
    return codes[rng.integers(0, k, n)], codes


def halfway(rng, n, k, d):
    """Elements beside n + 1/2 once scaled: a query's are rounded down, a code's up, away from each other."""
    sign, beside = rng.choice([-1, 1], d), rng.uniform(2.0**-8, 2.0**-6)
    x = sign * (rng.integers(0, 8, (n, d)) + 0.5 - beside)
    codes = sign * (rng.integers(8, 16, (k, d)) + 0.5 + beside)
    x[0] = 0
    x[0, 0] = LONGEST  # so that the scale is a power of two
    return x, codes


def opposite(rng, n, k, d):
    """Queries and codes of the greatest length, which makes the greatest scores, and some of length 0."""
    x, codes = np.zeros((n, d)), np.zeros((k, d))
    x[::2, rng.integers(d)] = 1.0
    codes[::2] = -x[0]
    codes[1::4] = x[0] + 2.0**-12 * rng.standard_normal((len(codes[1::4]), d))
    return x, codes


ATTACKS = [random_exponents, near_ties, powers_of_two, canceling, swamped]


def smallest_margin(clone: tuple[int, bool], attack, seed: int, certificate_scale: float = 1.0) -> float:
    """The smallest margin, relative to the slack that the whole bound gives."""
    isa, int16 = clone
    rng = np.random.default_rng(seed)
    least = np.inf
    for trial in range(TRIALS):
        d = int(rng.choice([1, 2, 3, 4, 5, 8, 16, 33, 100]))
        x, codes = attack(rng, 12, 32, d)
        scale = 2.0 ** rng.integers(-40, 40)
        x, codes = (scale * x).astype(np.float32), (scale * codes).astype(np.float32)
        center = np.zeros(d, np.float32) if trial % 2 else codes[:8].mean(0)
        with np.errstate(all="ignore"):
            distance = contract_distance(x, codes)
        longest = 0.0 if not int16 else LONGEST if trial % 3 else dev.MAX_SCALED
        tight = dev.margins(isa, x, codes, center, distance, certificate_scale, longest)
        whole = dev.margins(isa, x, codes, center, distance, 1.0, longest)
        none = dev.margins(
            isa, x, codes, center, distance, 0.0, longest
        )  # what underflow, or rounding to halves, needs by itself
        covered = np.isfinite(whole)
        slack = whole[covered] - none[covered]
        least = min(least, float((tight[covered][slack > 0] / slack[slack > 0]).min(initial=np.inf)))
    return least


@pytest.mark.parametrize("clone", CLONES, ids=str)
@pytest.mark.parametrize("attack", [*ATTACKS, halfway, opposite])
def test_no_counterexample(clone, attack):
    assert smallest_margin(clone, attack, seed=1) >= 0


@pytest.mark.parametrize("clone", CLONES, ids=str)
def test_the_search_would_find_a_constant_eight_times_too_small(clone):
    for attack in ATTACKS if not clone[1] else (halfway, near_ties, random_exponents):
        assert smallest_margin(clone, attack, seed=1, certificate_scale=1 / 8) < 0, attack.__name__


@pytest.mark.parametrize("clone", [clone for clone in CLONES if clone[1]], ids=str)
def test_the_bound_of_int16_is_nearly_reached(clone):
    assert 0 <= smallest_margin(clone, halfway, seed=1) < 0.1


@pytest.mark.parametrize("clone", CLONES, ids=str)
def test_without_the_slack_the_index_is_wrong(clone):
    """And with it, it is right, on the same data."""
    isa, int16 = clone
    rng = np.random.default_rng(3)
    wrong, settled = {0.0: 0, 1.0: 0}, 0
    trials, num_codes = (
        (TRIALS // 5, 2000) if int16 else (TRIALS, 64)
    )  # few codes have no ties that 16 bits do not tell apart
    for _ in range(trials):
        d = int(rng.choice([2, 4, 16, 33] if int16 else [1, 2, 4, 16, 33]))
        x, codes = (array.astype(np.float32) for array in near_ties(rng, 24, num_codes, d))
        expected = contract_distance(x, codes).argmin(1)
        for scale in wrong:
            center = codes.mean(0) if int16 else np.zeros(d, np.float32)
            index, _, _, by_int16 = dev.search(isa, x, codes, center, certificate_scale=scale, int16=int16)
            wrong[scale] += int((index != expected).sum())
            settled += by_int16
    assert wrong[1.0] == 0 < wrong[0.0]
    assert (settled > 0) == int16


def test_torch_agrees_with_the_distance_used_here():
    x, codes = torch.randn(5, 7), torch.randn(9, 7)
    exact = (x[:, None].double() - codes[None].double()).square().sum(-1)
    np.testing.assert_allclose(contract_distance(x.numpy(), codes.numpy()), exact.numpy(), rtol=1e-5)
