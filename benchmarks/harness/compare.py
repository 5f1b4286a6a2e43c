"""Two checkouts of this project against each other: interleaved pairs of every case, each checkout in its own process.

    python -m benchmarks.cpu compare --old CHECKOUT [--pairs PAIRS] [--threads N ..] [--demo PAIRS]

Both checkouts must be built.  A pair times one case in the old and in the new checkout, one right after the other; the
order alternates.  Only one process works at a time: the other waits for input.  ``ratio`` is the old time divided by
the new time, so the new checkout is faster if it is above 1.  By default there are 9 pairs per case, each case runs
with torch's number of threads and with one, and the demo is not run; ``--demo`` sets its number of pairs.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cases import ACCEPTANCE, SMALL, Case
from benchmarks.harness.rows import Rows, commit_of, provenance

ROOT = Path(__file__).parents[2]
LARGEST_INDEX_DIM = 8
COVERAGE = 0.9
DEMO = Case("demo, training step", 64, 512, 256, 4)
DEMO_ALL = DEMO._replace(name="demo, all latents", N=8214)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--old", type=Path, required=True, help="a built checkout of this project")
    parser.add_argument("--old-python", help="its Python; <old>/.venv/bin/python if there is one, else this one")
    parser.add_argument("--new", type=Path, default=ROOT, help="the other checkout (this one)")
    parser.add_argument("--new-python", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="*", default=[torch.get_num_threads(), 1])
    parser.add_argument("--cases", nargs="*", metavar="TEXT", help="those whose name contains one of them")
    parser.add_argument("--demo", type=int, default=0, metavar="PAIRS", help="also pairs of whole runs of the demo")
    parser.add_argument("--small", action="store_true", help="small cases: a dry run")
    parser.add_argument("--out", type=Path, help="a folder for compare-cpu.csv; without it, nothing is written")


class Worker:
    """One checkout in a process of its own, which works only while it times a case."""

    def __init__(self, python: str, checkout: Path) -> None:
        source = Path(__file__).with_name("compare_worker.py").read_text()
        self.python, self.checkout = python, checkout.resolve()
        self.environment = os.environ | {"PYTHONPATH": str(self.checkout)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [python, "-c", source]
        self.process = subprocess.Popen(command, cwd=self.checkout, env=self.environment, **pipes)
        package = Path(self._answer())
        if package.parent != self.checkout:
            raise SystemExit(f"compare: expected revq_kernels of {self.checkout}, got {package}")
        self.commit = commit_of(self.checkout)

    def seconds(self, case: dict[str, Any]) -> float:
        """Seconds per call of a case."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def demo(self) -> float:
        """Seconds of a run of the demo in a process of its own."""
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            command = [self.python, "-m", "revq", "demo", "--out", f"{out}/demo"]
            subprocess.run(command, cwd=self.checkout, env=self.environment, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the process of {self.checkout} ended with status {self.process.wait()}")
        return json.loads(line)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Two of the sorted ratios, between which the median of their distribution lies with probability >= `COVERAGE`.

    This assumes independent pairs and nothing about the distribution.  With fewer than 5 pairs no interval reaches the
    probability, and the smallest and the largest ratio are returned.
    """
    ordered, pairs = sorted(ratios), len(ratios)
    outside, skipped = 0.0, 0
    for number in range(pairs // 2):  # `outside`: probability that the median is below ordered[number]
        outside += math.comb(pairs, number) / 2**pairs
        if 1 - 2 * outside < COVERAGE:
            break
        skipped = number
    return ordered[skipped], ordered[-1 - skipped]


def compare(options: argparse.Namespace) -> None:
    """Print a line per case and number of threads, and write it as a row if a folder is given."""
    beside = (options.old / ".venv" / "bin" / "python").absolute()
    old_python = options.old_python or (str(beside) if beside.exists() else sys.executable)
    old, new = Worker(old_python, options.old), Worker(options.new_python, options.new)
    command = "python -m benchmarks.cpu compare --old CHECKOUT"
    origin = {**provenance(f"{command} --pairs {options.pairs} --demo {options.demo}"), "old_commit": old.commit}
    rows = Rows("compare-cpu", options.out, origin | {"commit": new.commit}) if options.out else None

    def report(case: str, what: str, threads: int, pairs: list[tuple[float, float]]) -> None:
        row = summary(pairs)
        old_ms, new_ms, ratio, low, high = row.values()
        label = f"{case}: {what}, {threads} threads"
        print(
            f"{label:44} {old_ms:>9.3f} ms {new_ms:>9.3f} ms {ratio:>6.3f}x   {low:.3f} - {high:.3f}",
            flush=True,
        )
        if rows:
            rows.add([{"case": case, "what": what, "threads": threads, "pairs": len(pairs), **row}])

    print(f"old {old.checkout}, new {new.checkout}; ratio = old / new, {options.pairs} pairs")
    print(f"{'case':44} {'old':>10} {'new':>10} {'ratio':>7}   {COVERAGE:.0%} interval")
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, whats) in enumerate(_cases(options)):
            path = Path(folder, f"{number}.pt")
            torch.save(case.tensors(), path)
            for what in whats:
                for threads in options.threads:
                    asked = {"what": what, "threads": threads, "tensors": str(path)}
                    pairs = _pairs(options.pairs, lambda worker, asked=asked: worker.seconds(asked), old, new)
                    report(case.name, what, threads, pairs)
            path.unlink()
    if options.demo:
        report("demo", "whole run", torch.get_num_threads(), _pairs(options.demo, Worker.demo, old, new))


def _cases(options: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    found = [
        (case, ["search", *(["index", "index build"] if case.d <= LARGEST_INDEX_DIM else [])])
        for case in (SMALL[:1] if options.small else ACCEPTANCE)
    ]
    found += [(DEMO, ["quantize", "training step"]), (DEMO_ALL, ["search"])]
    return [pair for pair in found if options.cases is None or any(text in pair[0].name for text in options.cases)]


def _pairs(count: int, call: Any, old: Worker, new: Worker) -> list[tuple[float, float]]:
    pairs = []
    for number in range(count):
        order = (old, new) if number % 2 == 0 else (new, old)
        times = {id(worker): call(worker) for worker in order}
        pairs.append((times[id(old)], times[id(new)]))
    return pairs


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median milliseconds of both, the median ratio old / new, and the ends of its interval."""
    before, now = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    low, high = interval(ratios)
    values = {"old_ms": before, "new_ms": now, "ratio": statistics.median(ratios), "low": low, "high": high}
    return {name: round(value, 4) for name, value in values.items()}
