"""Peak memory of one call above what was allocated before it: on a GPU by torch's allocator, on a CPU by the kernel.

On a CPU (Linux) each call runs in a process of its own, where the growth of the high-water mark of resident memory is
what the call needed.
"""

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Call
from benchmarks.providers import PROVIDERS

LIMIT_S = 120.0
SEARCH_QUERIES, SEARCH_CODES = 64, 64
"""Size of the first call, which loads libraries and starts threads: both cost memory that a search does not need."""


def gpu_peak_mb(call: Call, device: torch.device) -> float | None:
    """Megabytes allocated above what was allocated before the call, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def search_peak_mb(case: Case, provider: str, threads: int) -> float | str:
    """Megabytes of a provider's search, its indices included and its preparation not; or why they are not known."""
    return peak_mb(_prepared_search, case, provider, threads)


def peak_mb(prepare: Callable[..., Call], *arguments: Any) -> float | str:
    """Megabytes that the call which ``prepare(*arguments)`` returns needs in a new process; or why they are not known.

    The processes are forked from a server that has imported the modules below and called nothing, so that no row pays
    for imports.
    """
    if not Path("/proc/self/clear_refs").exists():
        return ""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "benchmarks.harness.latents"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, prepare, arguments))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(LIMIT_S) else f"not within {LIMIT_S:.0f} s"
    except EOFError:
        process.join(10)
        return f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _child(send: Connection, prepare: Callable[..., Call], arguments: tuple[Any, ...]) -> None:
    try:
        call = prepare(*arguments)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        result = call()
        send.send(round(max(0, _status("VmHWM") - before) / 1e6, 1))
        del result
    except Exception as error:
        send.send(f"{type(error).__name__}: {str(error)[:80]}")


def _prepared_search(case: Case, name: str, threads: int) -> Call:
    torch.set_num_threads(threads)
    provider = PROVIDERS[name]
    x, codebook = case.tensors()
    if provider.slow_start:  # it compiles for this shape
        provider.search(x, codebook)
    else:
        provider.search(x[:SEARCH_QUERIES].contiguous(), codebook[:, :SEARCH_CODES].contiguous())
    prepared = provider.prepared(codebook)
    return lambda: provider.call(x, prepared)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
