"""All measurements on a GPU: correctness first, then rates of its units, search times and training steps.

    python -m benchmarks.gpu [--minutes 10] [--out DIR] [--parts rates search train] [--providers NAME ...]
    python -m benchmarks.gpu --device cpu        # a dry run of the same code on small cases

The first wrong result of this library ends the run with exit status 1.  Rows are on disk as soon as they exist; what the
time does not reach gets a row that says so.  `python -m benchmarks.cpu report` puts the rows into the docs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_step
from benchmarks.harness import gpu_rates
from benchmarks.harness.cases import PAPER, PAPER_DATA, SINGLE, SMALL, Case
from benchmarks.harness.correctness import WrongResultError, check_case, check_contract_suite
from benchmarks.harness.measure import blank, measure
from benchmarks.harness.rows import RESULTS, Row, Rows, gpu_columns, provenance
from benchmarks.harness.timing import Clock
from benchmarks.providers import BRUTE_FORCE, Provider, serving
from revq_kernels import explain, nearest_code

ROUNDS = 7
PARTS = ("rates", "search", "train")
RESERVE_S = {"search": 25.0, "compile": 60.0, "train": 30.0}
"""Seconds that must be left to start a case, per kind of case."""
NOT_REACHED = "not reached: the run's time was up"


class Run:
    """One run: its device, its time limit and the folder of its rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.end = time.monotonic() + 60 * options.minutes
        self.device = torch.device(options.device)
        self.small = options.small or options.device == "cpu"
        self.rounds = 3 if self.small else ROUNDS
        self.clock = Clock(self.device)
        named = gpu_columns() if options.device == "cuda" else {"card": "dry run"}
        self.card = named["card"]
        small = "-small" if options.small and options.device == "cuda" else ""
        self.slug = self.card.lower().replace(" ", "-") + small
        self.out = options.out or (RESULTS if options.device == "cuda" else Path("runs/gpu-dry-run"))
        self.source = provenance(options.command) | named
        self.providers = serving(options.device, options.providers)

    def rows(self, name: str) -> Rows:
        """A file of rows."""
        return Rows(f"{name}-gpu-{self.slug}", self.out, self.source)

    def seconds_left(self) -> float:
        """Seconds until the time is up."""
        return self.end - time.monotonic()

    def clocks(self) -> Row:
        """The columns of the GPU with its present clocks, which change during a run."""
        return gpu_columns() if self.device.type == "cuda" else {}


def correctness(run: Run) -> None:
    """Check the contract suite, then every paper shape, with duplicates too, against all codes."""
    rows, start = run.rows("correctness"), time.monotonic()
    count = check_contract_suite(run.device)
    rows.add([_checked("contract suite", f"{count} problems", time.monotonic() - start, "")])
    for case in SMALL if run.small else PAPER_DATA[:3] + PAPER:
        start = time.monotonic()
        x, codebook = case.tensors(seed=1, device=run.device)
        indices = nearest_code(x, codebook)
        pairs = check_case(case, x, codebook, indices)
        if not torch.equal(nearest_code(x, codebook), indices):
            raise WrongResultError(f"{case.name}: a second call gives other indices")
        rows.add([_checked(case.name, f"{pairs} pairs", time.monotonic() - start, str(explain(x, codebook)))])


def _checked(name: str, checked: str, seconds: float, kernel: str) -> Row:
    print(f"correct: {name:24} {checked:>22}, none wrong, {seconds:6.1f} s   {kernel}", flush=True)
    return {"name": name, "checked": checked, "wrong": 0, "seconds": round(seconds, 1), "kernel": kernel}


def search(run: Run) -> None:
    """The paper's shapes first, then other data and single codebooks; torch.compile last: it compiles per shape."""
    rows = run.rows("search")
    compiled = [provider for provider in run.providers if provider.name.startswith("torch.compile")]
    others = [provider for provider in run.providers if provider not in compiled]
    for case in SMALL if run.small else PAPER + PAPER_DATA + SINGLE:
        _search_case(run, rows, case, others, RESERVE_S["search"])
    for case in (SMALL[:1] if run.small else PAPER + SINGLE[:6]) if compiled else ():
        _search_case(run, rows, case, [BRUTE_FORCE, *compiled], RESERVE_S["compile"], repeated=True)


def _search_case(
    run: Run, rows: Rows, case: Case, providers: list[Provider], reserve: float, repeated: bool = False
) -> None:
    if run.seconds_left() < reserve:
        measured = [blank(case, provider, NOT_REACHED) for provider in providers]
    else:
        try:
            measured = measure(case, providers, run.clock, run.rounds, run.card)
        except Exception as error:  # such as too little memory for the case itself
            measured = [blank(case, provider, f"{type(error).__name__}: {str(error)[:160]}") for provider in providers]
    measured = [row for row in measured if not (repeated and row["provider"] == BRUTE_FORCE.name)]
    rows.add([row | run.clocks() for row in measured])
    for row in measured:
        wrong = f"{row['farther_share']:>10} {row['other_duplicate_share']:>10}"
        print(
            f"{case.name:24} {row['provider']:26} {row['mode']:6} {row['median_ms']:>10} ms {row['times_revq']:>8}x "
            f"roofline {row['roofline_ms']:>7} peak {row['peak_mb']:>9} MB wrong {wrong}  {row['note']}",
            flush=True,
        )


def train(run: Run) -> None:
    """A training step at the paper's sizes."""
    rows = run.rows("train")
    for case in SMALL[:1] if run.small else [PAPER[2], PAPER[0], PAPER[1]]:
        if run.seconds_left() < RESERVE_S["train"]:
            measured = [train_step.blank(case, mode, NOT_REACHED) for mode in train_step.MODES]
        else:
            measured = train_step.measure(case, run.clock, run.rounds)
        rows.add([row | run.clocks() for row in measured])
        train_step.show(measured)


def main(arguments: list[str] | None = None) -> None:
    """Check, then measure the parts that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="no case is started that might not end in them")
    parser.add_argument("--out", type=Path, help="folder of the rows (benchmarks/results, or runs/ for a dry run)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="small cases; always so on a CPU")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="what follows the checks")
    parser.add_argument("--providers", nargs="*", metavar="NAME", help="these and revq; all if not given")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu makes a dry run on small cases")
    given = {name: value for name, value in vars(options).items() if value not in (None, False) and name != "out"}
    options.command = "python -m benchmarks.gpu " + " ".join(_option(name, value) for name, value in given.items())
    run = Run(options)
    correctness(run)
    if "rates" in options.parts:
        gpu_rates.measure(run.clock, run.out, run.slug, run.rows("rates"), run.small)
    if "search" in options.parts:
        search(run)
    if "train" in options.parts:
        train(run)
    print(f"rows: {run.out}/*-gpu-{run.slug}.csv, {run.seconds_left():.0f} s left")


def _option(name: str, value: Any) -> str:
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(f"'{word}'" if " " in str(word) else str(word) for word in words)])


if __name__ == "__main__":
    main()
