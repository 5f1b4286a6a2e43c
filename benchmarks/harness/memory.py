"""Peak memory of one call above what stood before it, each provider in a process of its own (Linux).

The processes are forked from one that has imported everything and called nothing, so a row costs no imports.
"""

import contextlib
import ctypes
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness import latents  # noqa: F401  (imported before the fork)
from benchmarks.harness.cases import Case
from benchmarks.providers import PROVIDERS

LIMIT_S = 60.0


def peak(case: Case, provider: str, threads: int) -> float | str:
    """Megabytes that a call needs, its indices included and what was prepared not; or why that is not known."""
    if not Path("/proc/self/clear_refs").exists():
        return ""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, case, provider, threads))
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


def _child(send: Connection, case: Case, name: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    provider = PROVIDERS[name]
    try:
        x, codebook = case.tensors()
        # Libraries, threads and compiled programs are not what a search needs.
        few = codebook[:, :64].contiguous()
        if provider.slow_start:
            provider.search(x, codebook)
        else:
            provider.search(x[:64].contiguous(), few)
        prepared = provider.prepared(codebook)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        indices = provider.call(x, prepared)
        send.send(round(max(0, status("VmHWM") - before) / 1e6, 1))
        del indices
    except Exception as error:
        send.send(f"{type(error).__name__}: {str(error)[:80]}")


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
