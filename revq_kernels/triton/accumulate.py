"""Counts per code, and the segment sum: values added up per code, as the gradient to the codebook needs.

The segment sum has two forms.  The deterministic one sorts the rows by code (stable, so rows of one code stay in query
order) and adds up runs of equal codes: pieces of 64 rows in order, then 64 of those sums, and so on.  A code with at
most 64 rows gets the reference's result bit for bit.  The atomic one adds in whatever order the device schedules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from revq_kernels.triton.addressing import grouped_rows, query_rows

FAN_IN = 64
"""Rows that one program adds in order."""

PER_PROGRAM = 1024
"""Elements of one program."""


@triton.jit
def count_codes(indices, count, num_entries, num_groups, num_codes, BLOCK: tl.constexpr):
    """count int64 [G, K] += how often each code occurs in indices int64 [..., G], both contiguous."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = entry < num_entries
    index = tl.load(indices + entry, mask=valid, other=0)
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(count + entry % num_groups * num_codes + index, one, mask=valid, sem="relaxed")


@triton.jit
def add_runs(segment, partial, stride, num_rows, D, FAN_IN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Every row whose place in its run is a multiple of stride * FAN_IN adds the next rows of the run, stride apart.

    segment int64 [rows] is sorted; a run is a stretch of equal segments.  partial float32 [rows, D] is updated in
    place: only one program reads and writes a row.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < num_rows
    own = tl.load(segment + row, mask=exists, other=-1)
    low = tl.zeros([BLOCK], tl.int64)
    high = row
    while tl.max(high - low, axis=0) > 0:  # bisection for the first row of the run
        middle = (low + high) // 2
        before = tl.load(segment + middle, mask=exists, other=0) < own
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, middle)
    leads = exists & ((row - low) % (stride * FAN_IN) == 0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    cell = row[:, None] * D + column[None, :]
    valid = leads[:, None] & (column < D)[None, :]
    total = tl.load(partial + cell, mask=valid, other=0.0)
    other = row
    more = leads
    step = 1
    while step < FAN_IN:
        other += stride
        more = more & (other < num_rows)
        more = more & (tl.load(segment + other, mask=more, other=-1) == own)
        value = tl.load(partial + other[:, None] * D + column[None, :], mask=more[:, None] & valid, other=0.0)
        total = tl.where(more[:, None], total + value, total)
        step = tl.where(tl.max(more.to(tl.int32), axis=0) > 0, step + 1, FAN_IN)
    tl.store(partial + cell, total, mask=valid)


@triton.jit
def gather_rows(
    values,
    inner,
    stride_outer,
    stride_inner,
    stride_g,
    stride_d,
    order,
    partial,
    num_groups,
    num_rows,
    D,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial float32 [rows, D] = the rows of values [..., G, D] in the order of their segments."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query = tl.load(order + row, mask=row < num_rows, other=0)
    n = query // num_groups
    source = query_rows(values, n, query % num_groups, inner, stride_outer, stride_inner, stride_g)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (row < num_rows)[:, None] & (column < D)[None, :]
    value = tl.load(source[:, None] + column[None, :] * stride_d, mask=valid, other=0.0).to(tl.float32)
    tl.store(partial + row[:, None] * D + column[None, :], value, mask=valid)


@triton.jit
def store_runs(segment, partial, total, num_rows, D, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """total float32 [G * K, D]: at each segment the first row of its run, which holds the sum of the whole run."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < num_rows
    own = tl.load(segment + row, mask=exists, other=-1)
    leads = exists & (tl.load(segment + row - 1, mask=exists & (row > 0), other=-1) != own)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = leads[:, None] & (column < D)[None, :]
    value = tl.load(partial + row[:, None] * D + column[None, :], mask=valid, other=0.0)
    tl.store(total + own[:, None] * D + column[None, :], value, mask=valid)


@triton.jit
def add_atomically(
    values,
    inner,
    stride_outer,
    stride_inner,
    stride_g,
    stride_d,
    indices,
    total,
    num_groups,
    num_codes,
    num_queries,
    D,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total float32 [G, K, D] += the rows of values [..., G, D], in no particular order."""
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = query // num_groups
    g = query % num_groups
    source = query_rows(values, n, g, inner, stride_outer, stride_inner, stride_g)
    index = tl.load(indices + query, mask=query < num_queries, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (query < num_queries)[:, None] & (column < D)[None, :]
    value = tl.load(source[:, None] + column[None, :] * stride_d, mask=valid, other=0.0).to(tl.float32)
    target = total + (g * num_codes + index)[:, None] * D + column[None, :]
    tl.atomic_add(target, value, mask=valid, sem="relaxed")


def count_codes_(count: Tensor, indices: Tensor) -> None:
    """Add to count int64 ``[G, K]`` how often each code occurs in indices int64 ``[..., G]``.

    An index out of range stops the device's stream by an assertion.
    """
    num_groups, num_codes = count.shape
    if indices.numel() == 0:
        return
    # the assertion is a kernel too, so that the host does not wait for the device
    torch._assert_async(
        ((indices >= 0) & (indices < num_codes)).all(), f"indices: expected values in [0, K={num_codes})"
    )
    grid = (triton.cdiv(indices.numel(), PER_PROGRAM),)
    count_codes[grid](indices.contiguous(), count, indices.numel(), num_groups, num_codes, BLOCK=PER_PROGRAM)


def segment_sum(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """values ``[..., G, d]``, indices int64 ``[..., G]`` -> sums float32 ``[G, K, d]``, deterministic."""
    num_groups, d = values.shape[-2:]
    total = torch.zeros(num_groups * num_codes, d, dtype=torch.float32, device=values.device)
    if indices.numel() == 0:
        return total.view(num_groups, num_codes, d)
    group = torch.arange(num_groups, device=indices.device) * num_codes
    segment, order = torch.sort((indices + group).reshape(-1), stable=True)
    num_rows = segment.numel()
    columns = min(triton.next_power_of_2(d), 64)
    block = PER_PROGRAM // columns
    grid = (triton.cdiv(num_rows, block), triton.cdiv(d, columns))
    partial = torch.empty(num_rows, d, dtype=torch.float32, device=values.device)
    rows = grouped_rows(values)
    gather_rows[grid](*rows.arguments(), order, partial, num_groups, num_rows, d, BLOCK=block, COLUMNS=columns)
    stride = 1
    while stride < rows.count:  # no run is longer than a group has queries
        add_runs[grid](segment, partial, stride, num_rows, d, FAN_IN=FAN_IN, BLOCK=block, COLUMNS=columns)
        stride *= FAN_IN
    store_runs[grid](segment, partial, total, num_rows, d, BLOCK=block, COLUMNS=columns)
    return total.view(num_groups, num_codes, d)


def segment_sum_atomic(values: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """As `segment_sum` but faster; the order of summation, and so the rounding, may differ between runs."""
    num_groups, d = values.shape[-2:]
    total = torch.zeros(num_groups, num_codes, d, dtype=torch.float32, device=values.device)
    if indices.numel() == 0:
        return total
    columns = min(triton.next_power_of_2(d), 64)
    block = PER_PROGRAM // columns
    grid = (triton.cdiv(indices.numel(), block), triton.cdiv(d, columns))
    add_atomically[grid](
        *grouped_rows(values).arguments(),
        indices.contiguous(),
        total,
        num_groups,
        num_codes,
        indices.numel(),
        d,
        BLOCK=block,
        COLUMNS=columns,
    )
    return total
