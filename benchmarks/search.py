"""The wide suite: the paper's shapes on every kind of data and a grid of single codebooks, with every provider.

    python -m benchmarks.search [--minutes 25] [--providers NAME ...] [--cases TEXT ...] [--no-memory] [--out DIR]

Interleaved rounds, medians; refused when one of our indices is wrong.  Rows are on disk as soon as they exist, and what
the time does not reach gets a row that says so.  Providers that compile for seconds per case (torch.compile, KeOps)
come last, on the paper's shapes and one case per d.  ``pytest benchmarks/bench_search.py`` runs the same under
pytest-benchmark.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.acceptance import versions
from benchmarks.harness.cases import CPU_PAPER, SEARCH, SMALL, Case
from benchmarks.harness.measure import Row, blank, measure
from benchmarks.harness.memory import peak
from benchmarks.harness.rows import RESULTS, Rows, provenance
from benchmarks.harness.timing import Clock
from benchmarks.providers import OURS, Provider, serving
from tests.fuzz.compiled import fma_gflops

ROUNDS = 7
SECONDS_EACH = 1.5
"""Of a provider in a case: one that uses them up leaves after the round."""
RESERVE_S, RESERVE_COMPILED_S = 20.0, 60.0
ONE_PER_DIM = "K16384"


def passes(cases: list[Case], names: list[str] | None) -> list[tuple[Case, list[Provider]]]:
    """What is measured, in order."""
    providers = [provider for provider in serving("cpu", names) if not provider.missing]
    quick = [provider for provider in providers if not provider.slow_start]
    slow = [provider for provider in providers if provider.slow_start]
    some = [case for case in cases if case in CPU_PAPER or case.name.endswith(ONE_PER_DIM) or case in SMALL]
    return [(case, quick) for case in cases] + [(case, [OURS, *slow]) for case in some if slow]


def measured(case: Case, providers: list[Provider], *, rounds: int = ROUNDS, memory: bool = True) -> list[Row]:
    """Rows of one case with peak memory."""
    try:
        rows = measure(case, providers, Clock(torch.device("cpu")), rounds, seconds_each=SECONDS_EACH)
    except (ValueError, RuntimeError) as error:  # such as too few real latents, or too little memory
        return [blank(case, provider, f"{type(error).__name__}: {str(error)[:160]}") for provider in providers]
    for row in rows if memory else ():
        if row["median_ms"] != "":
            row["peak_mb"] = peak(case, row["provider"], torch.get_num_threads())
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search")
    parser.add_argument("--minutes", type=float, default=25.0, help="no case is started that might not end in them")
    parser.add_argument("--providers", nargs="*", metavar="NAME", help="these and revq; all if not given")
    parser.add_argument("--cases", nargs="*", metavar="TEXT", help="those whose name starts so")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--small", action="store_true", help="small cases: a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    threads = torch.get_num_threads()
    source = provenance("python -m benchmarks.search")
    rows = Rows("search-cpu", options.out, source | {"gflops_peak": round(fma_gflops(threads), 1), "peers": versions()})
    cases = SMALL if options.small else SEARCH
    if options.cases is not None:
        cases = [case for case in cases if case.name.startswith(tuple(options.cases))]
    for number, (case, providers) in enumerate(passes(cases, options.providers)):
        compiled = any(provider.slow_start for provider in providers)
        if time.monotonic() + (RESERVE_COMPILED_S if compiled else RESERVE_S) > end:
            found = [blank(case, provider, "not reached: the run's time was up") for provider in providers]
        else:
            rounds = 3 if options.small else ROUNDS
            found = measured(case, providers, rounds=rounds, memory=not options.no_memory and number < len(SEARCH))
        found = [row for row in found if not (compiled and row["provider"] == OURS.name)]
        rows.add(found)
        for row in found:
            print(
                f"{case.name:18} {row['provider']:26} {row['median_ms']:>10} ms {row['times_revq']:>7}x "
                f"peak {row['peak_mb']:>8} MB wrong {row['farther_share']} {row['other_twin_share']}  {row['note']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
