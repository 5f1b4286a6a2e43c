"""Ctrl-C and termination: at once where nothing can be saved, at the end of a step where a checkpoint can."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What people and schedulers stop a process with: Ctrl-C, `kill` or a time limit, a closed terminal."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work.

    Attributes:
        number: the signal.
        saved: what of the work is on disk, as a clause that starts in lower case; empty if nothing is known to be.
    """

    def __init__(self, number: int = signal.SIGINT, saved: str = "") -> None:
        super().__init__(saved or "nothing is saved")
        self.number, self.saved = number, saved


class StopRequest:
    """Whether a signal has asked the work to stop.

    Attributes:
        number: the signal; None without one.
    """

    def __init__(self) -> None:
        self.number: int | None = None


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise `Interrupted`, as Ctrl-C does, so that temporary files are removed.

    A signal that the process ignores or handles itself is left as it is; so are all outside the main thread.
    """
    with _handlers(_raise):
        yield


@contextmanager
def signals_wait() -> Iterator[StopRequest]:
    """Within the block the first signal sets ``number`` of the yielded request; a second one raises `Interrupted` at once.

    The block ends its work in order when it sees the request.  A request that it has not seen raises at its end.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            raise Interrupted(number)
        request.number = number
        # Not print: a signal may arrive within another call of it, which Python does not allow to nest.
        os.write(2, b"\nrevq: stopping after this step; a second Ctrl-C stops at once\n")

    with _handlers(note):
        yield request
    if request.number is not None:
        raise Interrupted(request.number)


@contextmanager
def _handlers(handler: "signal._HANDLER") -> Iterator[None]:
    """Install ``handler`` for every signal that nobody else handles."""
    replaced = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in SIGNALS:
            present = signal.getsignal(number)
            if present in (signal.SIG_DFL, signal.default_int_handler, _raise):
                replaced[number] = present
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, present in replaced.items():
            signal.signal(number, present)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
