"""Before a first pass: each group's center and scale, and the state of every query.

The nearest code does not change when query and codes are shifted and scaled alike.  A first pass in low precision needs
numbers of moderate size around zero, so each group gets a center (the mean of some of its codes) and a scale (a power of
two).  Neither has to be good: the certificate holds for any of them, and a bad one only sends more queries to the
fallback.
"""

import triton
import triton.language as tl

SAMPLES = 128
"""Codes per group that the center and the scale are taken from, evenly spaced: reading all would cost a pass."""


@triton.jit
def initialize_state(limit, found, unsettled, key, first_query, num_states, BLOCK: tl.constexpr):
    """limit = inf, found = unsettled = 0, key = the largest int64, for BLOCK queries."""
    query = first_query + tl.arange(0, BLOCK)
    valid = query < num_states
    tl.store(limit + query, tl.full([BLOCK], float("inf"), tl.float32), mask=valid)
    tl.store(found + query, tl.zeros([BLOCK], tl.int32), mask=valid)
    tl.store(unsettled + query, tl.zeros([BLOCK], tl.int32), mask=valid)
    tl.store(key + query, tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64), mask=valid)


@triton.jit
def center_and_scale(
    codes, stride_k, stride_d, center, scale, num_codes,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One group: codes [K, D] -> its center [D] and its scale."""
    column = tl.arange(0, PADDED_D)
    samples = tl.minimum(num_codes, SAMPLES)
    stride_k = (num_codes // samples).to(tl.int64) * stride_k
    total = tl.zeros([PADDED_D], tl.float32)
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        valid = (sample < samples)[:, None] & (column < D)[None, :]
        value = tl.load(codes + sample[:, None] * stride_k + column[None, :] * stride_d, mask=valid, other=0.0).to(
            tl.float32
        )
        total += tl.sum(value, axis=0)
    mean = total / samples.to(tl.float32)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # false for a NaN too
    tl.store(center + column, mean, mask=column < D)

    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        valid = (sample < samples)[:, None] & (column < D)[None, :]
        value = tl.load(codes + sample[:, None] * stride_k + column[None, :] * stride_d, mask=valid, other=0.0).to(
            tl.float32
        )
        value = tl.where(valid, value - mean[None, :], 0.0)
        largest = tl.max(tl.abs(value), axis=1)
        unit = value / tl.where(largest > 0, largest, 1.0)[:, None]  # squares of these neither overflow nor vanish
        norm = largest * tl.sqrt(tl.sum(unit * unit, axis=1))
        spread = tl.maximum(spread, tl.where(norm < float("inf"), norm, 0.0))
    exponent = ((tl.max(spread, axis=0).to(tl.int32, bitcast=True) >> 23) & 255) - 127
    power = tl.minimum(tl.maximum(5 - exponent, -100), 100)  # norms of the sample end in [32, 64)
    tl.store(scale, ((power + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["num_states", "num_groups", "num_codes"])
def prepare(
    codebook, codebook_stride_g, codebook_stride_k, codebook_stride_d,
    center, scale, limit, found, unsettled, key, num_states, num_groups, num_codes,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Program p prepares STATES queries, and group p if there is one: center float32 [G, D], scale float32 [G]."""
    pid = tl.program_id(0).to(tl.int64)
    initialize_state(limit, found, unsettled, key, pid * STATES, num_states, STATES)
    if pid < num_groups:
        center_and_scale(
            codebook + pid * codebook_stride_g, codebook_stride_k, codebook_stride_d, center + pid * D, scale + pid,
            num_codes, D, PADDED_D, ROWS, SAMPLES,
        )  # fmt: skip
