"""Limits of the machine: the measured multiply-add peak of a CPU, and the roofline of a search on a GPU."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.cases import Case

BUILD_FOLDER = Path(__file__).parents[2] / "runs" / "compiled"
# -ffp-contract=off as for the kernels (setup.py): only the multiply-adds that the source writes out are fused.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall"]


class NoCompilerError(RuntimeError):
    """There is no C++ compiler."""


def build(source: Path) -> ctypes.CDLL:
    """A C++ file as a library: compiled at first use with ``$CXX`` (``c++`` if CXX is not set), kept in ``runs/``.

    Raises:
        NoCompilerError: if there is no such program; with CXX set, ``c++`` is not tried.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise NoCompilerError("no C++ compiler: install one, or name it in CXX")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    features = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256((source.read_text() + repr(FLAGS) + features).encode()).hexdigest()[:16]
    path = BUILD_FOLDER / f"{source.stem}-{digest}.so"
    if not path.exists():
        BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-o", str(temporary), str(source)], check=True)
        temporary.replace(path)
    return ctypes.CDLL(str(path))


@functools.cache
def _fma_peak() -> ctypes.CDLL:
    loaded = build(Path(__file__).with_name("fma_peak.cpp"))
    loaded.fma_work.argtypes = [ctypes.c_int64, ctypes.c_int64]
    loaded.fma_work.restype = ctypes.c_double
    return loaded


def fma_gflops(threads: int, seconds: float = 0.3) -> float:
    """Measured multiply-add peak of ``threads`` threads together, in 10^9 operations per second; NaN if no compiler.

    The multiply-adds are independent and stay in registers; each counts as two operations.  The result is the best of
    the runs that start within ``seconds``, the first run included.
    """
    steps, best = 1 << 22, 0.0
    try:
        library = _fma_peak()  # compiled before the clock starts
    except (NoCompilerError, subprocess.CalledProcessError):
        return float("nan")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        operations = library.fma_work(threads, steps)
        best = max(best, operations / (time.perf_counter() - start) / 1e9)
    return best


class Card(NamedTuple):
    """Rates of a GPU.

    ``tensor_fma``, ``float_fma`` and ``minima`` are rates per multiprocessor and clock cycle; ``tensor_fma``
    counts half-precision multiply-adds with float32 accumulators.  ``gigahertz`` is a clock frequency that the GPU
    holds under load, not its boost clock.
    """

    processors: int
    gigahertz: float
    gigabytes_per_s: float
    tensor_fma: int
    float_fma: int = 128
    minima: int = 64


# Sources: multiprocessors and per-clock rates from the vendor's architecture white papers and the CUDA programming
# guide's throughput table; bandwidth as a device-to-device copy reaches it (bytes read plus bytes written).
CARDS = {
    "NVIDIA H200": Card(132, 1.70, 4300.0, 2048),
    "NVIDIA GeForce RTX 4090": Card(128, 2.52, 940.0, 256),
}


class Roofline(NamedTuple):
    """Least milliseconds of one search, per unit that could limit it."""

    memory: float
    tensor: float
    minima: float
    float_fma: float

    @property
    def tensor_core_search(self) -> float:
        """Least milliseconds of a search whose scores come from the tensor cores; it does not use ``float_fma``."""
        return max(self.memory, self.tensor, self.minima)


def roofline(case: Case, card_name: str) -> Roofline | None:
    """The roofline of a case; None for a GPU whose rates are not listed.

    A pair is a query and a code.  ``tensor`` and ``minima`` belong to a search on the tensor cores, ``float_fma`` to a
    search on the CUDA cores; ``memory`` limits both.

    * tensor: per pair, d multiply-adds and two for the norm (a high and a low half-precision part), rounded up to a
      multiple of 16, the step of the instruction.
    * minima: one instruction takes the minimum of three values in both halves of a register.  It adds two new scores to
      each running minimum, so it handles four pairs.
    * float_fma: d float32 multiply-adds per pair.
    """
    card = CARDS.get(card_name)
    if card is None:
        return None
    clocks_per_ms = card.processors * card.gigahertz * 1e6
    padded_dim = 16 * -(-(case.d + 2) // 16)
    return Roofline(
        memory=case.bytes / card.gigabytes_per_s / 1e6,
        tensor=case.pairs * padded_dim / (clocks_per_ms * card.tensor_fma),
        minima=case.pairs * 0.25 / (clocks_per_ms * card.minima),
        float_fma=case.pairs * case.d / (clocks_per_ms * card.float_fma),
    )
