"""Triton kernels that each keep one unit of a GPU busy: separate because importing the file imports Triton."""

import triton
import triton.language as tl

# Three-input forms are two two-input instructions in PTX, which the assembler joins where the GPU has such a unit.
# The operands rotate from step to step, so that the compiler cannot drop a step as a repetition.
MINIMA = {
    "min, 3 x int32": "min.s32 $0, $1, $2; min.s32 $0, $0, $3;",
    "min, 3 x half2": "min.f16x2 $0, $1, $2; min.f16x2 $0, $0, $3;",
    "min, 2 x half2": "min.f16x2 $0, $1, $2;",
    "min, 2 x float32": "min.f32 $0, $1, $2;",
    "fma, float32": "fma.rn.f32 $0, $1, $2, $3;",
}


@triton.jit
def elementwise_rate(
    out, steps, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr
):
    """Four chains of BLOCK words; a step runs the instruction sequence once on each of them."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FLOAT:
        a = place.to(tl.float32) * 1e-7 + 0.5
        b, c, e = a * 0.7, a * 0.3, a * 0.9
    else:
        a = place * 77
        b, c, e = a ^ 0x1234, a ^ 0x777, a ^ 0x3FF
    for _ in range(steps):
        a = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [a, b, c], dtype=a.dtype, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [b, c, e], dtype=a.dtype, is_pure=True, pack=1)
        c = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [c, e, a], dtype=a.dtype, is_pure=True, pack=1)
        e = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [e, a, b], dtype=a.dtype, is_pure=True, pack=1)
    tl.store(out + place, (a + b + c + e).to(out.dtype.element_ty))


@triton.jit
def matrix_rate(left, right, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """Repeat acc += left @ right on operands that stay in place: ``[M, K]`` and ``[K, N]`` half precision."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(left + rows[:, None] * K + inner[None, :])
    b = tl.load(right + inner[:, None] * N + columns[None, :])
    total = tl.zeros((M, N), dtype=ACCUMULATOR)
    for _ in range(steps):
        total = tl.dot(a, b, total, out_dtype=ACCUMULATOR)
    where = out + tl.program_id(0) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(where, total.to(tl.float32))


@triton.jit
def one_product(left, right, start, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """out = start + left @ right, once per program: ``[P, M, K]``, ``[P, K, N]`` half precision, ``[P, M, N]``."""
    program = tl.program_id(0)
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(left + program * M * K + rows[:, None] * K + inner[None, :])
    b = tl.load(right + program * K * N + inner[:, None] * N + columns[None, :])
    where = program * M * N + rows[:, None] * N + columns[None, :]
    total = tl.load(start + where).to(ACCUMULATOR)
    tl.store(out + where, tl.dot(a, b, total, out_dtype=ACCUMULATOR).to(tl.float32))
