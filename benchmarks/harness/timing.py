"""Time of one call on a CPU or a CUDA device, and calls measured in interleaved rounds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

FLUSH_BYTES = 256 << 20
"""Bytes written before every timed call on a GPU, so that no input stays in its cache (at least four times the L2)."""

SHORT_MS, LONG_MS = 5.0, 50.0
"""A call below SHORT_MS is repeated within a round, and the round's value is the median of the repeats.  A call below
LONG_MS is preceded by one that does not count: it restores the caches and wakes the threads after other providers ran."""


class Clock:
    """Milliseconds of a call: CUDA events around it on a GPU, wall time elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(FLUSH_BYTES, 4 * cache), dtype=torch.uint8, device=device)

    def once(self, call: Call) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)

    def round(self, call: Call) -> float:
        """Milliseconds of one call; the median of up to nine if the call is short."""
        first = self.once(call)
        if first > LONG_MS:
            return first
        repeats = max(1, min(9, int(2 * SHORT_MS / max(first, 1e-3))))
        return statistics.median(self.once(call) for _ in range(repeats))


def interleaved(calls: dict[str, Call], clock: Clock, rounds: int, seconds_each: float = 4.0) -> dict[str, list[float]]:
    """Milliseconds per round of every call; each round runs all calls in turn.

    A call that has used more than ``seconds_each`` seconds takes no part in later rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if spent[name] <= seconds_each:
                start = time.perf_counter()
                times[name].append(clock.round(call))
                spent[name] += time.perf_counter() - start
    return times


def captured(call: Call) -> Call:
    """The call as the replay of a CUDA graph; its inputs and results keep their addresses.

    Raises:
        RuntimeError: from CUDA, if the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
