"""Attacks on the bound of a box: as rounded, it is at most the exact distance of every code in the box.

The bound has no slack that could be too small (docs/kernels.md); only its arithmetic can be wrong.  So the attacks are
tested too: a bound that is fused, summed in another order, or larger by two units in the last place does not pass.
"""

import numpy as np
import pytest
import torch

from revq_kernels import native

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}")
dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")
DIMS = (1, 2, 3, 4, 5, 8, 16, 31, 64)
KINDS = ("normal", "exponents", "canceling", "powers", "denormal", "overflow")


def attack(kind, d, rng):
    """Queries float32 [200, d] and leaves of codes float32 [16, 16, d]."""
    x, codes = rng.standard_normal((200, d)), rng.standard_normal((16, 16, d))
    if kind == "exponents":
        x, codes = (values * 2.0 ** rng.integers(-20, 20, values.shape) for values in (x, codes))
    if kind == "canceling":
        codes = x[:16, None] * (1 + codes * 2.0 ** rng.integers(-24, -8, codes.shape))
        x = np.repeat(x[:16], 13, axis=0)[:200] * (1 + rng.integers(-1, 2, (200, d)) * 2.0**-23)
    if kind == "powers":
        x, codes = (np.sign(values) * 2.0 ** rng.integers(-3, 4, values.shape) for values in (x, codes))
        x = x * (1 + rng.integers(-1, 2, x.shape) * 2.0**-23)
    if kind in ("denormal", "overflow"):
        scale = {"denormal": 1e-20, "overflow": 1e19}[kind]
        x, codes = x * scale, codes * scale
    return x.astype(np.float32), codes.astype(np.float32)


def contract_distance(x, codes):
    """Exact distances, float32 [200, 16, 16]."""
    total = np.zeros((x.shape[0], *codes.shape[:2]), np.float32)
    for j in range(x.shape[1]):
        difference = x[:, None, None, j] - codes[None, ..., j]
        total = total + difference * difference
    return total


def boxes_of(codes, narrow):
    """Boxes of 16 leaves, [1, 2, d, 16]; narrow ones hold one code, whose distance the bound must equal."""
    codes = codes[:, :1] if narrow else codes
    return np.stack([codes.min(1).T, codes.max(1).T])[None].copy(), codes


def outside(x, boxes):
    """The differences that the bound squares, [200, 16, d]."""
    low, high = boxes[0, 0].T, boxes[0, 1].T
    return np.maximum(np.maximum(low - x[:, None], x[:, None] - high), np.float32(0))


@pytest.mark.parametrize("isa", range(dev.cpu_isa() + 1))
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_at_most_d(kind, d, isa):
    rng = np.random.default_rng(DIMS.index(d) * 100 + KINDS.index(kind))
    with np.errstate(all="ignore"):
        for _ in range(4):
            x, all_codes = attack(kind, d, rng)
            for narrow in (False, True):
                boxes, codes = boxes_of(all_codes, narrow)
                bound, distance = dev.run_bound(isa, x, boxes, 256), contract_distance(x, codes)
                assert not np.isnan(bound).any()
                assert (bound[..., None] <= distance).all()
                if narrow:
                    np.testing.assert_array_equal(bound, distance[..., 0])


@pytest.mark.parametrize("wrong", ["fused", "another order", "two units larger"])
def test_the_attacks_catch_a_wrong_bound(wrong):
    caught = 0
    rng = np.random.default_rng(0)
    for kind in ("normal", "exponents", "canceling", "powers"):
        x, codes = attack(kind, 8, rng)
        boxes, codes = boxes_of(codes, narrow=True)
        away, distance = outside(x, boxes), contract_distance(x, codes)[..., 0]
        if wrong == "fused":  # one rounding for a product and a sum: exact in double, then rounded
            bound = away[..., 0] * away[..., 0]
            for j in range(1, 8):
                bound = (bound.astype(np.float64) + away[..., j].astype(np.float64) ** 2).astype(np.float32)
        elif wrong == "another order":
            bound = np.zeros_like(distance)
            for j in reversed(range(8)):
                bound = bound + away[..., j] * away[..., j]
        else:
            bound = distance * np.float32(1 + 2.0**-22)
        assert (bound > distance).mean() > 0.02, kind
        caught += 1
    assert caught == 4


def test_a_raised_box_holds_the_boxes_below():
    """On every level a code lies in all boxes above it, also after a refit."""
    codebook = torch.randn(1, 5000, 3)
    arrays = torch.ops.revq.index_build(codebook)
    torch.ops.revq.index_refit_(*arrays, codebook * torch.randn(1, 5000, 1))
    panels, _, boxes, _ = arrays
    low = panels[0].amin(-1)  # [leaves, d]
    high = panels[0].amax(-1)
    first = 0
    for children in (313, 20, 2):
        blocks = -(-children // 16)
        for corner, expected in ((0, low), (1, high)):
            found = boxes[0, first : first + blocks, corner].transpose(1, 2).reshape(-1, 3)[:children]
            assert torch.equal(found, expected)
        low = torch.stack([part.amin(0) for part in low.split(16)])
        high = torch.stack([part.amax(0) for part in high.split(16)])
        first += blocks
    assert first == boxes.shape[1]
