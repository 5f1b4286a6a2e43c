"""Time of the search beside its peers: interleaved rounds, medians; refused when one of our indices is wrong.

python -m benchmarks.search [--providers NAME ...]     # all that are installed, or these
"""

import argparse

import torch

from benchmarks.cases import SEARCH
from benchmarks.clock import Clock
from benchmarks.measure import measure
from benchmarks.providers import serving
from benchmarks.rows import RESULTS, Rows, provenance

ROUNDS = 7
DEFAULT = ["torch.cdist", "addmm, chunked"]


def main() -> None:
    """Measure every case and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search")
    parser.add_argument("--providers", nargs="*", default=DEFAULT, metavar="NAME", help="none: every provider")
    providers = serving("cpu", parser.parse_args().providers)
    rows, clock = Rows("search-cpu", RESULTS, provenance()), Clock(torch.device("cpu"))
    for case in SEARCH:
        measured = measure(case, providers, clock, ROUNDS)
        rows.add(measured)
        for row in measured:
            print(
                f"{case.name:16} {row['provider']:24} {row['median_ms']:>10} ms  {row['times_revq']:>6}x  {row['note']}"
            )


if __name__ == "__main__":
    main()
