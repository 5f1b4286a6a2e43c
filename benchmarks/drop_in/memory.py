"""Peak memory of one call of a quantizer above what stood before it, in a process of its own (Linux)."""

import contextlib
import ctypes
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness.memory import status

LIMIT_S = 120.0


def peak(quantizer: str, training: bool, *, patched: bool) -> float | str:
    """Megabytes of a call, its results and gradients included; or why that is not known."""
    if not Path("/proc/self/clear_refs").exists():
        return ""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, quantizer, training, patched))
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


def _child(send: Connection, quantizer: str, training: bool, patched: bool) -> None:
    import torch

    import revq
    from benchmarks.drop_in.__main__ import step
    from benchmarks.drop_in.cases import CASES

    torch.set_num_threads(2)
    case = next(case for case in CASES if case.quantizer == quantizer)
    module, inputs = case.build().train(training), case.inputs()
    if patched:
        revq.patch(module, verify=False, verbose=False)
    step(
        module, case.method, tuple(_few(x) for x in inputs), training
    )  # libraries and threads are not what a call needs
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(module, case.method, inputs, training)
    send.send(round(max(0, status("VmHWM") - before) / 1e6, 1))


def _few(value: object) -> object:
    """A batch of one in the place of a batch."""
    import torch

    return value[:1] if isinstance(value, torch.Tensor) else value
