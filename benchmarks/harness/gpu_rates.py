"""Rates of a GPU's units that no data sheet gives, and how its matrix units round; part of `python -m benchmarks.gpu`.

The rounding goes to rounding-gpu-<card>.npz: operands, the GPU's results and the exact sums.  On a CPU, which has none
of these units, only the copy is timed and torch's own product stands in for the rounding.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.timing import Clock

BLOCK, STEPS, WARPS = 2048, 4096, 8
LANES_FMA = 128  # float32 multiply-adds per multiprocessor and clock since sm_86 (sm_80 has 64)
MATRIX_SHAPES = {"wgmma where there is one": (128, 256, 16), "wgmma, K = 64": (128, 256, 64), "mma.sync": (32, 256, 16)}
ACCUMULATORS = ("float32", "float16")
ROUNDING_SHAPES = {"M=64": (64, 16, 16), "M=16": (16, 16, 16)}


def row(quantity: str, value: float | str, unit: str, note: str = "") -> Row:
    """One rate."""
    return {"quantity": quantity, "value": value, "unit": unit, "note": note}


def copy_rate(clock: Clock, small: bool) -> Row:
    """Bandwidth of a copy within the GPU's memory."""
    source = torch.randn((1 << 20) if small else (1 << 29), device=clock.device)
    target = torch.empty_like(source)
    milliseconds = min(clock.round(lambda: target.copy_(source)) for _ in range(5))
    rate = 2 * source.nbytes / milliseconds / 1e6
    return row("copy, bytes read and written", round(rate, 1), "GB/s", f"{source.nbytes / 1e6:.0f} MB")


def elementwise_rates(clock: Clock) -> list[Row]:
    """Instructions per second of the minima and multiply-adds that a search needs."""
    from benchmarks.harness import gpu_rate_kernels as kernels

    processors = torch.cuda.get_device_properties(clock.device).multi_processor_count
    programs, per_second = 4 * processors, {}
    for name, asm in kernels.MINIMA.items():
        is_float = "float32" in name
        out = torch.empty(programs * BLOCK, dtype=torch.float32 if is_float else torch.int32, device=clock.device)
        constraints = "=f,f,f,f" if is_float else "=r,r,r,r"

        def launch(
            out: Tensor = out, asm: str = asm, constraints: str = constraints, is_float: bool = is_float
        ) -> None:
            kernels.elementwise_rate[(programs,)](out, STEPS, asm, constraints, is_float, BLOCK, num_warps=WARPS)

        launch()
        per_second[name] = programs * BLOCK * 4 * STEPS / min(clock.round(launch) for _ in range(5)) * 1e3
    lanes = {name: LANES_FMA * rate / per_second["fma, float32"] for name, rate in per_second.items()}
    note = "lanes per multiprocessor and clock, taking the float32 multiply-add's as 128"
    return [
        row(name, round(rate / 1e9, 1), "G words/s", f"{lanes[name]:.1f} {note}") for name, rate in per_second.items()
    ]


def matrix_rates(clock: Clock) -> list[Row]:
    """Multiply-adds per second of the matrix units, per instruction shape and accumulator."""
    import triton.language as tl

    from benchmarks.harness import gpu_rate_kernels as kernels

    programs, rows = 4 * torch.cuda.get_device_properties(clock.device).multi_processor_count, []
    for name, (m, n, k) in MATRIX_SHAPES.items():
        left = torch.randn(m, k, device=clock.device, dtype=torch.float16)
        right = torch.randn(k, n, device=clock.device, dtype=torch.float16) * 1e-3
        out = torch.empty(programs, m, n, device=clock.device)
        for accumulator in ACCUMULATORS:
            kind, warps = getattr(tl, accumulator), 8 if m >= 128 else 4

            def launch(a=left, b=right, c=out, m=m, n=n, k=k, kind=kind, warps=warps) -> None:
                kernels.matrix_rate[(programs,)](a, b, c, STEPS, m, n, k, kind, num_warps=warps)

            launch()
            rate = programs * m * n * k * STEPS / min(clock.round(launch) for _ in range(5)) * 1e3
            rows.append(
                row(f"MMA, {name}, {accumulator} accumulator", round(rate / 1e12, 1), "T fma/s", f"{m}x{n}x{k}")
            )
    return rows


def operands(shape: tuple[int, int, int], programs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Half-precision operands and a start value whose sum is exact in float64 and has bits far below its largest term.

    Every other program has one large product and, of one sign, small products near its last place.
    """
    generator = np.random.default_rng(seed)
    m, n, k = shape

    def wide(*size: int) -> np.ndarray:
        mantissa = 1 + generator.integers(0, 1024, size) / 1024
        return generator.choice([-1.0, 1.0], size) * mantissa * 2.0 ** generator.integers(-6, 6, size)

    left, right, start = wide(programs, m, k), wide(programs, k, n), wide(programs, m, n)
    left[::2, :, 1:] = 2.0 ** -generator.integers(10, 14, left[::2, :, 1:].shape)
    right[::2, 1:] = generator.choice([-1.0, 1.0], (len(right[::2]), 1, n)) * 2.0 ** -generator.integers(8, 14)
    left[::2, :, 0] = right[::2, 0] = 1
    start[::2] = 0
    return torch.from_numpy(left).half(), torch.from_numpy(right).half(), torch.from_numpy(start).float()


def product(left: Tensor, right: Tensor, start: Tensor, accumulator: str) -> Tensor:
    """start + left @ right on the device's matrix unit; by torch in float32 on a CPU."""
    if left.device.type != "cuda":
        return torch.baddbmm(start, left.float(), right.float())
    import triton.language as tl

    from benchmarks.harness import gpu_rate_kernels as kernels

    out = torch.empty_like(start)
    (programs, m, k), n = left.shape, right.shape[2]
    kernels.one_product[(programs,)](left, right, start, out, m, n, k, getattr(tl, accumulator), num_warps=4)
    return out


def rounding(device: torch.device, path: Path, programs: int = 64) -> list[Row]:
    """Save the vectors; the distance of the results from the exact sums, in last places of the largest term."""
    saved, rows = {}, []
    for name, shape in ROUNDING_SHAPES.items():
        left, right, start = operands(shape, programs)
        terms = left.double()[:, :, :, None] * right.double()[:, None]
        exact = start.double() + terms.sum(2)
        largest = torch.maximum(terms.abs().amax(2), start.double().abs())
        saved |= {f"{name} left": left, f"{name} right": right, f"{name} start": start, f"{name} exact": exact}
        for accumulator in ACCUMULATORS if device.type == "cuda" else ACCUMULATORS[:1]:
            got = product(left.to(device), right.to(device), start.to(device), accumulator).cpu()
            saved[f"{name} {accumulator}"] = got
            bits = 24 if accumulator == "float32" else 11
            error = (got.double() - exact) / largest * 2.0**bits
            toward_zero = (error * exact.sign() <= 0).double().mean()
            note = f"{100 * toward_zero:.1f} % not away from zero; largest towards +inf {error.max():.2f}, -inf {-error.min():.2f}"
            rows.append(
                row(f"MMA rounding, {name}, {accumulator}", round(error.abs().max().item(), 3), f"2^-{bits}", note)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{key: value.numpy() for key, value in saved.items()})
    return rows


def measure(clock: Clock, folder: Path, slug: str, rows: Rows, small: bool) -> None:
    """Every rate, each written as soon as it is known; the note of a rate that fails is its error."""
    parts = {"copy": lambda: [copy_rate(clock, small)]}
    if clock.cuda:
        parts |= {"minima": lambda: elementwise_rates(clock), "matrix": lambda: matrix_rates(clock)}
    parts["rounding"] = lambda: rounding(clock.device, folder / f"rounding-gpu-{slug}.npz", 4 if small else 64)
    for name, part in parts.items():
        try:
            found = part()
        except Exception as error:
            found = [row(name, "", "", f"{type(error).__name__}: {str(error)[:160]}")]
        rows.add(found)
        for line in found:
            print(f"{line['quantity']:45} {line['value']:>12} {line['unit']:8} {line['note']}", flush=True)
