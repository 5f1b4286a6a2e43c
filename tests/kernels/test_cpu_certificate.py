"""The first pass' bound, attacked: no code's score exceeds the limit of its own D (docs/kernels.md, "The certificate").

`margins` gives limit(D) - score for every query and code; one that is negative is a counterexample.
"""

import numpy as np
import pytest
import torch

dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")

CLONES = range(dev.cpu_isa() + 1)
TRIALS = 150


def contract_distance(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """D of the contract, ``[n, K]``."""
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


def cancelling(rng, n, k, d):
    """x'.c' is a small sum of large products."""
    x, codes = rng.standard_normal((n, d)), rng.standard_normal((k, d))
    half = d // 2
    x[:, half : 2 * half] = x[:, :half]
    codes[:, half : 2 * half] = -codes[:, :half] * (1 + 2.0**-20 * rng.standard_normal((k, half)))
    return x, codes


def swamped(rng, n, k, d):
    """One large number, then many products that are each rounded away: errors that all have one sign."""
    small = np.sqrt(rng.uniform(0.2, 0.999, (k, 1)) * 2.0**-25)
    codes = np.concatenate([1 + rng.uniform(0, 2.0**-12, (k, 1)), np.repeat(small, d - 1, 1)], axis=1)
    return codes[rng.integers(0, k, n)], codes


ATTACKS = [random_exponents, near_ties, powers_of_two, cancelling, swamped]


def smallest_margin(isa: int, attack, seed: int, certificate_scale: float = 1.0) -> float:
    """Relative to the slack that the whole bound gives."""
    rng = np.random.default_rng(seed)
    least = np.inf
    for trial in range(TRIALS):
        d = int(rng.choice([1, 2, 3, 4, 5, 8, 16, 33, 100]))
        x, codes = attack(rng, 12, 32, d)
        scale = 2.0 ** rng.integers(-40, 40)
        x, codes = (scale * x).astype(np.float32), (scale * codes).astype(np.float32)
        centre = np.zeros(d, np.float32) if trial % 2 else codes[:8].mean(0)
        with np.errstate(all="ignore"):
            distance = contract_distance(x, codes)
        tight = dev.margins(isa, x, codes, centre, distance, certificate_scale)
        whole = dev.margins(isa, x, codes, centre, distance, 1.0)
        none = dev.margins(isa, x, codes, centre, distance, 0.0)  # underflow's share alone
        covered = np.isfinite(whole)
        slack = whole[covered] - none[covered]
        least = min(least, float((tight[covered][slack > 0] / slack[slack > 0]).min(initial=np.inf)))
    return least


@pytest.mark.parametrize("isa", CLONES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_counterexample(isa, attack):
    assert smallest_margin(isa, attack, seed=1) >= 0


@pytest.mark.parametrize("isa", CLONES)
def test_the_search_would_find_a_constant_eight_times_too_small(isa):
    for attack in ATTACKS:
        assert smallest_margin(isa, attack, seed=1, certificate_scale=1 / 8) < 0, attack.__name__


@pytest.mark.parametrize("isa", CLONES)
def test_without_the_slack_the_index_is_wrong(isa):
    """And with it, it is right, on the same data."""
    rng = np.random.default_rng(3)
    wrong = {0.0: 0, 1.0: 0}
    for _ in range(TRIALS):
        x, codes = (array.astype(np.float32) for array in near_ties(rng, 24, 64, int(rng.choice([1, 2, 4, 16, 33]))))
        expected = contract_distance(x, codes).argmin(1)
        for scale in wrong:
            index, _, _ = dev.search(isa, x, codes, np.zeros(x.shape[1], np.float32), certificate_scale=scale)
            wrong[scale] += int((index != expected).sum())
    assert wrong[1.0] == 0 < wrong[0.0]


def test_torch_agrees_with_the_distance_used_here():
    x, codes = torch.randn(5, 7), torch.randn(9, 7)
    exact = (x[:, None].double() - codes[None].double()).square().sum(-1)
    np.testing.assert_allclose(contract_distance(x.numpy(), codes.numpy()), exact.numpy(), rtol=1e-5)
