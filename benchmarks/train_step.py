"""One training step of `FastChannelVQ` (forward, backward, AdamW) three ways: eager, compiled, and as a CUDA graph."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Clock, interleaved, peak_mb
from revq_kernels import FastChannelVQ

WARM_UP, STEPS = 3, 3
"""Eager steps that every way takes first, and steps of its own after which the results are compared."""

TOLERANCE = 1e-5
"""Largest difference of a code after a compiled step: a compiler may reorder the loss's sums.  A graph must be equal."""


@dataclass
class Training:
    """A quantizer with its optimizer and one batch; the same for one seed and device."""

    vq: FastChannelVQ
    optimizer: torch.optim.Optimizer
    x: Tensor
    forward: Callable[[Tensor], Any]

    def step(self) -> Tensor:
        """One step; the indices it chose."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.forward(self.x)
        output.loss.backward()
        self.optimizer.step()
        return output.indices


def start(case: Case, device: torch.device) -> Training:
    """Tokens ``[N, G, d]``, one codebook per token."""
    x, codebook = case.tensors(device=device)
    vq = FastChannelVQ(1, case.d, num_groups=case.G, estimator="none")
    vq.codebook, vq.num_codes = torch.nn.Parameter(codebook), case.K
    vq.count = torch.zeros(case.G, case.K, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW([vq.codebook], lr=1e-3, fused=True, capturable=device.type == "cuda")
    return Training(vq, optimizer, x, vq)


def eager(training: Training) -> Callable[[], Tensor]:
    return training.step


def compiled(training: Training) -> Callable[[], Tensor]:
    """Forward and backward as one whole graph each; the optimizer stays as it is.  A CPU's dry run only traces them."""
    backend = "inductor" if training.x.is_cuda else "aot_eager"
    training.forward = torch.compile(training.vq, fullgraph=True, backend=backend)
    return training.step


def graphed(training: Training) -> Callable[[], Tensor]:
    """The whole step captured after eager steps on a side stream, as torch's notes on CUDA graphs ask."""
    training.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = training.step()

    def replay() -> Tensor:
        graph.replay()
        return indices

    return replay


WAYS: dict[str, Callable[[Training], Callable[[], Tensor]]] = {"eager": eager, "graph": graphed, "compile": compiled}


def difference(training: Training, indices: Tensor, expected: Training, truth: Tensor, exact: bool) -> str:
    """What is not as it should be, or nothing."""
    if not torch.equal(indices, truth):
        return f"{int((indices != truth).sum())} indices differ"
    if not torch.equal(training.vq.count, expected.vq.count):
        return "counts differ"
    largest = (training.vq.codebook - expected.vq.codebook).abs().max().item()
    return f"codebook differs by {largest:.3g}" if largest > (0 if exact else TOLERANCE) else ""


def blank(case: Case, way: str, note: str = "") -> dict[str, Any]:
    """A row with nothing measured yet."""
    empty = dict.fromkeys(("rounds", "median_ms", "min_ms", "max_ms", "peak_mb", "equal"), "")
    return {**case._asdict(), "way": way, **empty, "note": note}


def measure(case: Case, clock: Clock, rounds: int, ways: tuple[str, ...] = tuple(WAYS)) -> list[dict[str, Any]]:
    """One row per way, each compared with the eager steps before it is timed."""
    expected = start(case, clock.device)
    truth = [expected.step() for _ in range(WARM_UP + STEPS)][-1]
    rows, calls = {}, {}
    for way in ways:
        rows[way] = blank(case, way, "" if way != "graph" or clock.cuda else "needs a card")
        if rows[way]["note"]:
            continue
        try:
            training = start(case, clock.device)
            _warm_up(training, clock)
            call = WAYS[way](training)
            indices = [call() for _ in range(STEPS)][-1]
            rows[way]["note"] = difference(training, indices, expected, truth, exact=way != "compile")
            rows[way]["equal"] = not rows[way]["note"]
            peak = peak_mb(call, clock.device)
            rows[way]["peak_mb"] = "" if peak is None else round(peak, 1)
            calls[way] = call
        except Exception as error:
            rows[way]["note"] = f"{type(error).__name__}: {str(error)[:160]}"
    for way, times in interleaved(calls, clock, rounds).items():
        rows[way] |= {"rounds": len(times), "median_ms": round(statistics.median(times), 4)}
        rows[way] |= {"min_ms": round(min(times), 4), "max_ms": round(max(times), 4)}
    return list(rows.values())


def _warm_up(training: Training, clock: Clock) -> None:
    if not clock.cuda:
        for _ in range(WARM_UP):
            training.step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
