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
# Without -ffp-contract=off a compiler may fuse a product into a sum, which changes the last bit of a distance.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall"]


class NoCompilerError(RuntimeError):
    """There is no C++ compiler."""


def build(source: Path) -> ctypes.CDLL:
    """A C++ file as a library: compiled with the system's compiler at first use, kept in ``runs/``.

    Raises:
        NoCompilerError: without c++ (or the program that CXX names).
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
    """Measured peak of this machine: independent multiply-adds in registers, 10^9 operations (two each) per second.

    NaN without a compiler.
    """
    steps, best = 1 << 22, 0.0
    try:
        library = _fma_peak()  # the build does not count as time
    except (NoCompilerError, subprocess.CalledProcessError):
        return float("nan")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        operations = library.fma_work(threads, steps)
        best = max(best, operations / (time.perf_counter() - start) / 1e9)
    return best


class Card(NamedTuple):
    """Rates of a GPU; per multiprocessor and clock where not said otherwise.

    ``tensor_fma`` counts half-precision multiply-adds with float32 accumulators.  The clock is one that the GPU holds
    under load, not its boost clock.
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
        """Of a search on the tensor cores: one pass in half precision, three-input minima of two half values."""
        return max(self.memory, self.tensor, self.minima)


def roofline(case: Case, card_name: str) -> Roofline | None:
    """The roofline of a case; None for a GPU whose rates are not listed.

    tensor: d products and two elements for the norm, in the instruction's steps of 16.  minima: one instruction per
    four pairs.  float_fma: d multiply-adds per pair on the CUDA cores.
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
