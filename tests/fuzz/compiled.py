"""The suite's own compiled code (exhaustive.cpp): built with the system's compiler at first use, kept in ``runs/``."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("exhaustive.cpp")
FOLDER = Path(__file__).parents[2] / "runs" / "compiled"
# Contraction off: a product fused into a sum changes the last bit of D.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall"]


class NoCompilerError(RuntimeError):
    """There is no C++ compiler."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        NoCompilerError: without c++ (or the program that CXX names).
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise NoCompilerError("no C++ compiler: install one, or name it in CXX")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256((SOURCE.read_text() + repr(FLAGS) + flags).encode()).hexdigest()[:16]
    path = FOLDER / f"exhaustive-{digest}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-o", str(temporary), str(SOURCE)], check=True)
        temporary.replace(path)
    loaded = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.exhaustive.argtypes = [pointer, pointer, number, number, number, number, number, pointer]
    loaded.exhaustive.restype = None
    loaded.fma_work.argtypes = [number, number]
    loaded.fma_work.restype = ctypes.c_double
    return loaded


def exhaustive(x: Tensor, codebook: Tensor, threads: int) -> Tensor:
    """D against every code, x ``[N, G, d]`` and codebook ``[G, K, d]`` of any float type: indices ``[N, G]``."""
    (groups, codes, dim), queries = codebook.shape, x.shape[0]
    tile = library().tile_codes()
    padded = torch.nn.functional.pad(codebook.float(), (0, 0, 0, -codes % tile))
    columns = padded.view(groups, -1, tile, dim).transpose(2, 3).contiguous()
    x, indices = x.float().contiguous(), torch.empty(queries, groups, dtype=torch.int64)
    library().exhaustive(x.data_ptr(), columns.data_ptr(), queries, groups, codes, dim, threads, indices.data_ptr())
    return indices


def fma_gflops(threads: int, seconds: float = 0.3) -> float:
    """Measured peak of this machine: independent multiply-adds in registers, 10^9 operations (two each) per second."""
    steps, best = 1 << 22, 0.0
    try:
        library()  # built before the clock starts
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter()
            operations = library().fma_work(threads, steps)
            best = max(best, operations / (time.perf_counter() - start) / 1e9)
    except (NoCompilerError, subprocess.CalledProcessError):
        return float("nan")
    return best
