"""The CPU's benchmark commands, dry: what they refuse, what they write, and the tables made of it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import acceptance, search
from benchmarks.cpu_report import TARGETS, acceptance_table, search_table, shown, soak_table, wrong_table
from benchmarks.harness import latents
from benchmarks.harness import memory as peak
from benchmarks.harness.cases import ACCEPTANCE, SEARCH, SMALL, Case
from benchmarks.harness.plots import plots
from benchmarks.harness.rows import write
from benchmarks.providers import serving
from revq_kernels import native
from revq_kernels.testing.problems import contract_index, problems
from tests.fuzz import adversarial_problems as adversaries
from tests.fuzz import compiled, soak

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}"),
    pytest.mark.usefixtures("one_thread"),
]
try:
    compiled.library()
    COMPILED = ""
except (compiled.NoCompilerError, subprocess.CalledProcessError) as error:
    COMPILED = str(error)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_way_of_ours_is_gated():
    ours = [provider for provider in serving("cpu") if provider.ours]
    assert {p.name for p in ours} == {"revq", "revq, index", "revq, refit", "revq, automatic"}
    x, codebook = SMALL[1].tensors()
    for provider in ours:
        prepared = provider.prepared(codebook)
        truth = contract_index(x, codebook)
        assert torch.equal(provider.call(x, prepared), truth), provider.name
        if provider.name == "revq, refit":
            assert not torch.equal(prepared.codebooks[1], codebook)
            assert torch.equal(provider.call(x, prepared), contract_index(x, prepared.codebooks[1]))


def test_the_table_of_goals_has_a_case_each():
    assert [case.name for case in ACCEPTANCE] == list(TARGETS)
    assert len({case.name for case in SEARCH}) == len(SEARCH)
    assert {case.d for case in SEARCH} == {4, 8, 16, 32, 64, 256} and max(case.N for case in SEARCH) == 65536


def test_acceptance_writes_rows_and_a_table(tmp_path):
    acceptance.main(["--small", "--inside", "--threads", "1", "--rounds", "3", "--out", str(tmp_path)])
    rows = read(tmp_path / "acceptance-cpu-1t.csv")
    ours = [row for row in rows if row["provider"].startswith("revq")]
    assert len(ours) == 8 and all(len(row["rounds_ms"].split()) == 3 for row in ours)
    assert {"commit", "threads", "gflops_peak", "peers", "other_twin_share"} <= set(rows[0])
    assert all(float(row["farther_share"]) == float(row["other_twin_share"]) == 0 for row in ours)
    table = acceptance_table(tmp_path)
    assert SMALL[0].name in table and "torch.cdist" in table
    assert "not measured" not in table  # no goal for the small cases
    assert "writes the rows" in acceptance_table(tmp_path / "nothing")


def test_goals_reached_and_missed():
    assert shown([5.0, 6.0, 7.0], 5.5) == "6x (5-7), goal 5.5x"
    assert shown([5.0, 6.0, 7.0], 6.5, "faiss") == "**6x (5-7) faiss, MISSES 6.5x**"
    assert shown([], 2.0) == "not measured" and shown([], None) == ""


def test_wide_suite_writes_rows_tables_and_plots(tmp_path, monkeypatch):
    small = [Case(f"d4 K{k}", 8, 1, k, 4) for k in (1024, 4096)] + [SMALL[2]._replace(offset=1000.0)]
    monkeypatch.setattr(search, "SEARCH", small)
    monkeypatch.setattr(search, "ROUNDS", 2)
    search.main(["--providers", "torch.cdist", "faiss", "--no-memory", "--out", str(tmp_path)])
    rows = read(tmp_path / "search-cpu.csv")
    assert {row["name"] for row in rows} == {case.name for case in small}
    assert small[0].name in search_table(tmp_path)
    assert small[2].name in wrong_table(tmp_path) and small[0].name not in wrong_table(tmp_path)
    memory = [{"provider": "revq", "N": 8, "K": k, "d": 4, "peak_above_inputs_mb": 1.0} for k in (1024, 4096)]
    write("memory-cpu", memory, tmp_path)
    linked = plots(tmp_path, tmp_path / "page.md")
    assert (
        all((tmp_path / f"search-cpu-{name}.svg").exists() for name in ("throughput", "limit", "memory")) or not linked
    )
    search.main(["--minutes", "0", "--cases", "d4 K1024", "--providers", "--out", str(tmp_path)])
    assert all("not reached" in row["note"] for row in read(tmp_path / "search-cpu.csv"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_sees_a_distance_matrix():
    case = Case("", 4096, 1, 4096, 4)
    assert peak.peak(case, "revq", 1) < 8 < 64 < peak.peak(case, "torch.cdist", 1)
    assert peak.peak(case, "nobody", 1) == "its process ended with status 1"


@pytest.mark.skipif(bool(COMPILED), reason=f"no compiled reference: {COMPILED}")
def test_compiled_reference_is_the_contract():
    for problem in problems():
        if problem.x.numel():
            x = problem.x.reshape(-1, *problem.codebook.shape[::2])
            assert torch.equal(compiled.exhaustive(x, problem.codebook, 2), contract_index(x, problem.codebook)), (
                problem
            )
    assert compiled.fma_gflops(1, 0.01) > 0.1


@pytest.mark.skipif(bool(COMPILED), reason=f"no compiled reference: {COMPILED}")
def test_soak_passes_and_names_the_seed_of_a_wrong_index(tmp_path, monkeypatch, capsys):
    few = ["--pairs", "1e12", "--most-pairs", "2e5", "--problems", "40", "--threads", "1", "--out", str(tmp_path)]
    soak.main(few)
    (row,) = read(tmp_path / "soak-cpu.csv")
    assert row["wrong"] == "0" and row["problems"] == "40" and "index, refit" in row["compared"]
    search_right = soak.nearest_code
    monkeypatch.setattr(soak, "nearest_code", lambda x, c, **o: search_right(x, c, **o) ^ (c.shape[1] > 1000))
    with pytest.raises(SystemExit, match=r"WRONG: native.* seed 4[0-9]+"):
        soak.main([*few, "--seed", "40"])
    assert "WRONG" in soak_table(tmp_path) and len(read(tmp_path / "soak-cpu.csv")) == 2


def test_adversaries_are_the_same_for_a_seed_and_keep_their_size():
    kinds = set()
    for seed in range(200):
        problem, again = (adversaries.problem(seed, 20000, 40000) for _ in range(2))
        assert torch.equal(problem.x.nan_to_num(), again.x.nan_to_num()) and str(problem) == str(again)
        assert problem.pairs * problem.x.shape[2] <= 40000 or problem.pairs == 1, problem
        kinds.add(problem.kind)
    assert kinds == set(adversaries.KINDS)


def test_windows_of_a_frame_are_tokens_of_crops():
    class Frames:
        def batches(self, size):
            yield torch.arange(2 * 3 * 12 * 12).reshape(2, 3, 12, 12).float()

    groups = torch.tensor([0, 5, 3 * 16 - 1])
    found = latents.tokens(Frames(), 4, groups)
    assert found.shape == (2 * 25, 3, 4)
    assert found[1, 0].tolist() == [1, 2, 3, 4]  # the window one column on
    assert found[5, 1].tolist() == [40, 41, 42, 43]  # one row on: row 1 + 2 of 12, columns 4 to 7
    assert found[25, 0, 0] == 3 * 144


def test_pytest_benchmark_finds_the_cases_only_when_asked():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks/bench_search.py"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert f"bench_search.py: {len(SEARCH)}" in found.stdout, found.stdout
