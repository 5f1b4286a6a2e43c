"""One training step of `FastChannelVQ` (forward, backward, AdamW) in three modes: eager, compiled, as a CUDA graph.

    python -m benchmarks.train_step [--device cpu|cuda] [--small] [--rounds 7] [--out DIR]

Every mode is compared with eager steps before it is timed.  On a CPU the compiled step is traced but not compiled.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import CPU_PAPER, PAPER, SMALL, Case
from benchmarks.harness.memory import gpu_peak_mb
from benchmarks.harness.rows import Row, Rows, gpu_columns, provenance
from benchmarks.harness.timing import Call, Clock, interleaved
from revq_kernels import FastChannelVQ

RUNS = Path(__file__).parents[1] / "runs"
WARM_UP, STEPS = 3, 3
"""Eager steps before a mode starts, and steps in the mode after which its results are compared."""

TOLERANCE = 1e-5
"""Largest difference of a code after compiled steps: a compiler may reorder the loss's sums.  A graph must be equal."""


@dataclass
class Training:
    """A quantizer with its optimizer and one batch; the same for one seed and device."""

    vq: FastChannelVQ
    optimizer: torch.optim.Optimizer
    x: Tensor
    forward: Callable[[Tensor], Any]

    def step(self) -> Tensor:
        """One step; the indices of its search."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.forward(self.x)
        output.loss.backward()
        self.optimizer.step()
        return output.indices


def prepare(case: Case, device: torch.device) -> Training:
    """Tokens ``[N, G, d]``, one codebook per token."""
    x, codebook = case.tensors(device=device)
    vq = FastChannelVQ(1, case.d, num_groups=case.G, estimator="none")
    vq.codebook, vq.num_codes = torch.nn.Parameter(codebook), case.K
    vq.count = torch.zeros(case.G, case.K, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW([vq.codebook], lr=1e-3, fused=True, capturable=device.type == "cuda")
    return Training(vq, optimizer, x, vq)


def eager(training: Training) -> Call:
    """The step as it is."""
    return training.step


def compiled(training: Training) -> Call:
    """Forward and backward as one whole graph each; the optimizer stays eager."""
    backend = "inductor" if training.x.is_cuda else "aot_eager"
    training.forward = torch.compile(training.vq, fullgraph=True, backend=backend)
    return training.step


def graphed(training: Training) -> Call:
    """The whole step captured after eager steps on a side stream, as torch's notes on CUDA graphs require."""
    training.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = training.step()

    def replay() -> Tensor:
        graph.replay()
        return indices

    return replay


MODES: dict[str, Callable[[Training], Call]] = {"eager": eager, "graph": graphed, "compile": compiled}


def difference(training: Training, indices: Tensor, expected: Training, truth: Tensor, exact: bool) -> str:
    """How the results differ from the eager ones; "" if they do not."""
    if not torch.equal(indices, truth):
        return f"{int((indices != truth).sum())} indices differ"
    if not torch.equal(training.vq.count, expected.vq.count):
        return "counts differ"
    largest = (training.vq.codebook - expected.vq.codebook).abs().max().item()
    return f"codebook differs by {largest:.3g}" if largest > (0 if exact else TOLERANCE) else ""


def blank(case: Case, mode: str, note: str = "") -> Row:
    """A row with no measurement yet."""
    empty = dict.fromkeys(("rounds", "median_ms", "min_ms", "max_ms", "peak_mb", "equal"), "")
    return {**case._asdict(), "mode": mode, **empty, "note": note}


def measure(case: Case, clock: Clock, rounds: int, modes: tuple[str, ...] = tuple(MODES)) -> list[Row]:
    """One row per mode, each compared with the eager steps before it is timed."""
    expected = prepare(case, clock.device)
    truth = [expected.step() for _ in range(WARM_UP + STEPS)][-1]
    rows, calls = {}, {}
    for mode in modes:
        rows[mode] = blank(case, mode, "" if mode != "graph" or clock.cuda else "needs a GPU")
        if rows[mode]["note"]:
            continue
        try:
            training = prepare(case, clock.device)
            _warm_up(training, clock)
            call = MODES[mode](training)
            indices = [call() for _ in range(STEPS)][-1]
            rows[mode]["note"] = difference(training, indices, expected, truth, exact=mode != "compile")
            rows[mode]["equal"] = not rows[mode]["note"]
            peak = gpu_peak_mb(call, clock.device)
            rows[mode]["peak_mb"] = "" if peak is None else round(peak, 1)
            calls[mode] = call
        except Exception as error:
            rows[mode]["note"] = f"{type(error).__name__}: {str(error)[:160]}"
    for mode, times in interleaved(calls, clock, rounds).items():
        rows[mode] |= {"rounds": len(times), "median_ms": round(statistics.median(times), 4)}
        rows[mode] |= {"min_ms": round(min(times), 4), "max_ms": round(max(times), 4)}
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


def show(rows: list[Row]) -> None:
    """Print rows."""
    for row in rows:
        print(
            f"{row['name']:24} {row['mode']:8} {row['median_ms']:>10} ms equal {row['equal']}  {row['note']}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure the paper's shapes; a GPU's rows belong to `python -m benchmarks.gpu`, which checks it first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="one small case: a dry run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RUNS / "train-step", help="folder of the rows")
    options = parser.parse_args(arguments)
    named = gpu_columns() if options.device == "cuda" else {}
    rows = Rows(f"train-{options.device}", options.out, provenance("python -m benchmarks.train_step") | named)
    paper = PAPER if options.device == "cuda" else CPU_PAPER
    for case in SMALL[:1] if options.small else paper:
        measured = measure(case, Clock(torch.device(options.device)), options.rounds)
        rows.add(measured)
        show(measured)


if __name__ == "__main__":
    main()
