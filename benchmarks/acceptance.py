"""The acceptance table of the CPU search: revq's four ways beside the peers that come close, for 2 threads and for 1.

    python -m benchmarks.acceptance [--minutes 8] [--threads 2 1] [--rounds 9] [--out DIR]

The peers are those of `pip install -e ".[bench]"`.  At its end the table is in docs/benchmarks.md.
Each number of threads runs in a process of its own, so that every library is given it from the start.  Rows are on disk
as soon as they exist; a wrong index of ours ends the run with exit status 1.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import report
from benchmarks.harness.cases import ACCEPTANCE, SMALL, Case
from benchmarks.harness.measure import Row, blank, measure
from benchmarks.harness.memory import peak
from benchmarks.harness.rows import RESULTS, Rows, provenance, version
from benchmarks.harness.timing import Clock
from benchmarks.providers import PROVIDERS, Provider
from tests.fuzz.compiled import fma_gflops

NAMES = ["revq", "revq, automatic", "revq, index", "revq, refit", "faiss", "nanoflann", "scipy cKDTree", "torch.cdist"]
TREES = ("revq, index", "revq, refit", "nanoflann", "scipy cKDTree")
LARGEST_TREE_DIM = 8
"""The table asks for trees up to here; beyond, "revq, automatic" decides, and the wide suite has the others."""
PEERS = ("faiss-cpu", "scipy", "pynanoflann")
RESERVE_S = 20.0
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def providers(case: Case) -> list[Provider]:
    """Who takes part in a case."""
    return [PROVIDERS[name] for name in NAMES if case.d <= LARGEST_TREE_DIM or name not in TREES]


def versions() -> str:
    """The peers' versions."""
    return ", ".join(f"{package} {version(package) or 'absent'}" for package in PEERS)


def run(case: Case, rounds: int, memory: bool, small: bool) -> list[Row]:
    """One case's rows, with peak memory."""
    rows = measure(case, providers(case), Clock(torch.device("cpu")), rounds, seconds_each=0.5 if small else 6.0)
    for row in rows if memory else ():
        if row["median_ms"] != "":
            row["peak_mb"] = peak(case, row["provider"], torch.get_num_threads())
    return rows


def one_process(options: argparse.Namespace, threads: int) -> None:
    """All cases with a number of threads, until the time is up."""
    torch.set_num_threads(threads)
    end = time.monotonic() + 60 * options.minutes
    source = provenance(options.command) | {"peers": versions()}
    rows = Rows(f"acceptance-cpu-{threads}t", options.out, source)
    for case in SMALL[:2] if options.small else ACCEPTANCE:
        if time.monotonic() + RESERVE_S > end and not options.small:
            measured = [blank(case, provider, "not reached: the run's time was up") for provider in providers(case)]
        else:
            measured = run(case, options.rounds, threads > 1 and not options.small, options.small)
        peak_now = round(fma_gflops(threads), 1)
        rows.add([row | {"gflops_peak": peak_now} for row in measured])
        for row in measured:
            print(
                f"{threads} threads {case.name:16} {row['provider']:16} {row['median_ms']:>10} ms "
                f"{row['times_revq']:>7}x wrong {row['farther_share']} {row['other_twin_share']} peak {row['peak_mb']} "
                f"{row['kernel']} {row['note']}",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all numbers of threads together")
    parser.add_argument("--threads", type=int, nargs="*", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="small cases: a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one number of threads
    options = parser.parse_args(arguments)
    options.command = "python -m benchmarks.acceptance" + (" --small" if options.small else "")
    if options.inside:
        one_process(options, options.threads[0])
        return
    if not options.small:
        from benchmarks.harness import latents

        latents.main()  # before the clock starts
    for threads in options.threads:
        minutes = options.minutes / len(options.threads)
        command = [sys.executable, "-m", "benchmarks.acceptance", "--inside", "--threads", str(threads)]
        command += ["--minutes", str(minutes), "--rounds", str(options.rounds), "--out", str(options.out.resolve())]
        command += ["--small"] if options.small else []
        environment = os.environ | dict.fromkeys(ENVIRONMENT, str(threads))
        status = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=False).returncode
        if status:
            raise SystemExit(status)
    if options.out == RESULTS and not options.small:
        report.main()


if __name__ == "__main__":
    main()
