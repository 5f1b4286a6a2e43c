"""The searches on a CPU: the acceptance table, the wide suite, peak memory, and this checkout against another one.

    python -m benchmarks.cpu                     acceptance, search, memory, then report
    python -m benchmarks.cpu acceptance          the table of goals, with two threads and with one
    python -m benchmarks.cpu search              every kind of data and a grid of sizes, with every provider
    python -m benchmarks.cpu memory              peak memory against K (Linux)
    python -m benchmarks.cpu report              write the tables of docs/benchmarks.md and docs/drop-in.md
    python -m benchmarks.cpu compare --old ...   interleaved pairs of two checkouts

The other libraries are those of ``pip install -e ".[bench]"``.  Rows are on disk as soon as they exist, what the time
does not reach gets a row that says so, and a wrong index of this library ends the run with exit status 1.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import compare, latents, report
from benchmarks.harness.cases import ACCEPTANCE, CPU_PAPER, MEMORY, SEARCH, SMALL, Case
from benchmarks.harness.machine import fma_gflops
from benchmarks.harness.measure import blank, measure
from benchmarks.harness.memory import search_peak_mb
from benchmarks.harness.rows import RESULTS, Row, Rows, provenance, version
from benchmarks.harness.timing import Clock
from benchmarks.providers import BRUTE_FORCE, PROVIDERS, Provider, serving

NAMES = ["revq", "revq, index", "revq, refit", "faiss", "nanoflann", "scipy cKDTree", "torch.cdist"]
TREES = ("revq, index", "revq, refit", "nanoflann", "scipy cKDTree")
LARGEST_TREE_DIM = 8
"""The acceptance table has goals for trees up to this d; the wide suite measures them for every d."""
PEERS = ("faiss-cpu", "scipy", "pynanoflann")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SEARCH_ROUNDS = 7
ACCEPTANCE_SECONDS_EACH, SEARCH_SECONDS_EACH, SMALL_SECONDS_EACH = 6.0, 1.5, 0.5
"""Seconds of one provider in one case; see `interleaved`."""
RESERVE_S, RESERVE_COMPILED_S = 20.0, 60.0
"""Seconds that must be left to start a case, without and with providers that compile."""
ONE_PER_DIM = "K16384"
NOT_REACHED = "not reached: the run's time was up"


def peer_versions() -> str:
    """The versions of the other libraries."""
    return ", ".join(f"{package} {version(package) or 'absent'}" for package in PEERS)


def measured(case: Case, providers: list[Provider], rounds: int, seconds_each: float, memory: bool) -> list[Row]:
    """The rows of one case, with peak memory if wanted."""
    rows = measure(case, providers, Clock(torch.device("cpu")), rounds, seconds_each=seconds_each)
    for row in rows if memory else ():
        if row["median_ms"] != "":
            row["peak_mb"] = search_peak_mb(case, row["provider"], torch.get_num_threads())
    return rows


def acceptance(options: argparse.Namespace) -> None:
    """The table of goals; one process per number of threads, so that every library starts with that number."""
    if not options.small:
        latents.prepare()  # before the time of the run starts
    for threads in options.threads:
        command = [sys.executable, "-m", "benchmarks.cpu", "acceptance", "--in-process", "--threads", str(threads)]
        command += ["--minutes", str(options.minutes / len(options.threads)), "--rounds", str(options.rounds)]
        command += ["--out", str(options.out.resolve()), *(["--small"] if options.small else [])]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        status = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=False).returncode
        if status:
            raise SystemExit(status)


def acceptance_in_process(options: argparse.Namespace) -> None:
    """All acceptance cases with one number of threads, until the time is up."""
    threads, end = options.threads[0], time.monotonic() + 60 * options.minutes
    torch.set_num_threads(threads)
    command = "python -m benchmarks.cpu acceptance" + (" --small" if options.small else "")
    rows = Rows(f"acceptance-cpu-{threads}t", options.out, provenance(command) | {"peers": peer_versions()})
    seconds_each = SMALL_SECONDS_EACH if options.small else ACCEPTANCE_SECONDS_EACH
    memory = threads > 1 and not options.small
    for case in SMALL[:2] if options.small else ACCEPTANCE:
        providers = [PROVIDERS[name] for name in NAMES if case.d <= LARGEST_TREE_DIM or name not in TREES]
        if time.monotonic() + RESERVE_S > end and not options.small:
            found = [blank(case, provider, NOT_REACHED) for provider in providers]
        else:
            found = measured(case, providers, options.rounds, seconds_each, memory)
        peak = round(fma_gflops(threads), 1)
        rows.add([row | {"gflops_peak": peak} for row in found])
        _print(f"{threads} threads", found)


def search_passes(cases: list[Case], names: list[str] | None) -> list[tuple[Case, list[Provider]]]:
    """What the wide suite measures, in order: providers that compile for seconds come last, on some of the cases."""
    providers = [provider for provider in serving("cpu", names) if not provider.missing]
    quick = [provider for provider in providers if not provider.slow_start]
    slow = [provider for provider in providers if provider.slow_start]
    some = [case for case in cases if case in CPU_PAPER or case.name.endswith(ONE_PER_DIM) or case in SMALL]
    return [(case, quick) for case in cases] + [(case, [BRUTE_FORCE, *slow]) for case in some if slow]


def search(options: argparse.Namespace) -> None:
    """The wide suite: the paper's shapes on every kind of data and a grid of single codebooks, with every provider."""
    end, threads = time.monotonic() + 60 * options.minutes, torch.get_num_threads()
    limits = {"gflops_peak": round(fma_gflops(threads), 1), "peers": peer_versions()}
    rows = Rows("search-cpu", options.out, provenance("python -m benchmarks.cpu search") | limits)
    cases = SMALL if options.small else SEARCH
    if options.cases is not None:
        cases = [case for case in cases if case.name.startswith(tuple(options.cases))]
    for number, (case, providers) in enumerate(search_passes(cases, options.providers)):
        compiles = any(provider.slow_start for provider in providers)
        memory = not options.no_memory and number < len(SEARCH)
        if time.monotonic() + (RESERVE_COMPILED_S if compiles else RESERVE_S) > end:
            found = [blank(case, provider, NOT_REACHED) for provider in providers]
        else:
            try:
                found = measured(case, providers, 3 if options.small else SEARCH_ROUNDS, SEARCH_SECONDS_EACH, memory)
            except (ValueError, RuntimeError) as error:  # such as too few real latents, or too little memory
                found = [blank(case, each, f"{type(error).__name__}: {str(error)[:160]}") for each in providers]
        found = [row for row in found if not (compiles and row["provider"] == BRUTE_FORCE.name)]
        rows.add(found)
        _print("search", found)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a call against K: each provider in a process of its own."""
    rows = Rows("memory-cpu", options.out, provenance("python -m benchmarks.cpu memory"))
    for case in MEMORY[:2] if options.small else MEMORY:
        for provider in (provider for provider in serving("cpu", options.providers) if not provider.missing):
            peak = search_peak_mb(case, provider.name, torch.get_num_threads())
            found = {"peak_above_inputs_mb": "", "note": peak} if isinstance(peak, str) else {}
            rows.add([{**case._asdict(), "provider": provider.name, "peak_above_inputs_mb": peak, "note": "", **found}])
            print(f"{case.name:12} {provider.name:26} {peak:>8} MB above its inputs", flush=True)


def everything(options: argparse.Namespace) -> None:
    """All measurements, then the pages."""
    for name in ("acceptance", "search", "memory"):
        main([name, "--out", str(options.out), *(["--small"] if options.small else [])])
    if options.out == RESULTS:
        report.rewrite_pages()


def _print(label: str, rows: list[Row]) -> None:
    for row in rows:
        print(
            f"{label} {row['name']:18} {row['provider']:26} {row['median_ms']:>10} ms {row['times_revq']:>7}x "
            f"peak {row['peak_mb']:>8} MB wrong {row['farther_share']} {row['other_duplicate_share']}  {row['note']}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run what it names."""
    # without defaults: a command's default would replace the value given before the command
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--small", action="store_true", help="small cases: a dry run")
    shared.add_argument("--out", type=Path, help="folder of the rows (benchmarks/results)")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    parser.set_defaults(run=everything, small=False, out=RESULTS)
    commands = parser.add_subparsers()

    accept = commands.add_parser("acceptance", parents=[shared])
    accept.add_argument("--minutes", type=float, default=8.0, help="for all numbers of threads together")
    accept.add_argument("--threads", type=int, nargs="*", default=[2, 1])
    accept.add_argument("--rounds", type=int, default=9)
    accept.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    accept.set_defaults(run=lambda options: (acceptance_in_process if options.in_process else acceptance)(options))

    wide = commands.add_parser("search", parents=[shared])
    wide.add_argument("--minutes", type=float, default=25.0, help="no case is started that might not end in them")
    wide.add_argument("--providers", nargs="*", metavar="NAME", help="these and revq; all if not given")
    wide.add_argument("--cases", nargs="*", metavar="TEXT", help="those whose name starts so")
    wide.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    wide.set_defaults(run=search)

    peak = commands.add_parser("memory", parents=[shared])
    peak.add_argument("--providers", nargs="*", metavar="NAME", help="these and revq; all if not given")
    peak.set_defaults(run=memory)

    pages = commands.add_parser("report")
    pages.set_defaults(run=lambda options: report.rewrite_pages())

    two = commands.add_parser("compare")
    compare.add_arguments(two)
    two.set_defaults(run=compare.compare)

    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
