"""The wide suite under pytest-benchmark, which times revq; the rows hold every provider, interleaved.

pytest benchmarks/bench_search.py [-k "512T or d16"]        # rows go to runs/bench-search/

Not collected by a plain `pytest`.  A wrong index of ours fails the test before anything is timed.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.harness.cases import SEARCH
from benchmarks.harness.rows import Rows, provenance
from benchmarks.providers import OURS, serving
from benchmarks.search import ROUNDS, measured

OUT = Path(__file__).parents[1] / "runs" / "bench-search"


@pytest.fixture(scope="module")
def rows():
    return Rows("search-cpu", OUT, provenance("pytest benchmarks/bench_search.py"))


@pytest.mark.parametrize("case", SEARCH, ids=[case.name for case in SEARCH])
def test_search(case, benchmark, rows):
    providers = [p for p in serving("cpu") if not p.missing and not p.slow_start]
    found = measured(case, providers, memory=False)
    rows.add(found)
    benchmark.group = f"d = {case.d}"
    benchmark.extra_info |= {row["provider"]: row["median_ms"] for row in found} | {"threads": torch.get_num_threads()}
    x, codebook = case.tensors()
    benchmark.pedantic(OURS.call, args=(x, codebook), rounds=ROUNDS, warmup_rounds=1)
