"""The CPU's benchmark commands as dry runs: the rows they write, the tables and plots of the rows, what they refuse."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cpu
from benchmarks.harness import compare, latents
from benchmarks.harness.cases import ACCEPTANCE, SEARCH, SMALL, Case
from benchmarks.harness.memory import search_peak_mb
from benchmarks.harness.plots import cpu_plots
from benchmarks.harness.report import GOALS, acceptance_table, ratio_cell, search_table, wrong_table
from benchmarks.harness.rows import RESULTS, write
from benchmarks.harness.rows import read as read_rows
from benchmarks.providers import serving
from revq_kernels import native
from revq_kernels.testing.problems import contract_index

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}"),
    pytest.mark.usefixtures("one_thread"),
]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_search_of_ours_is_checked():
    ours = [provider for provider in serving("cpu") if provider.ours]
    assert {p.name for p in ours} == {"revq", "revq, index", "revq, refit"}
    x, codebook = SMALL[1].tensors()
    for provider in ours:
        prepared = provider.prepared(codebook)
        truth = contract_index(x, codebook)
        assert torch.equal(provider.call(x, prepared), truth), provider.name
        if provider.name == "revq, refit":
            assert not torch.equal(prepared.codebooks[1], codebook)
            assert torch.equal(provider.call(x, prepared), contract_index(x, prepared.codebooks[1]))


def test_every_acceptance_case_has_goals():
    assert [case.name for case in ACCEPTANCE] == list(GOALS)
    assert len({case.name for case in SEARCH}) == len(SEARCH)
    assert {case.d for case in SEARCH} == {4, 8, 16, 32, 64, 256} and max(case.N for case in SEARCH) == 65536
    assert cpu.SEARCH_ROUNDS >= 7


def test_committed_rows_belong_to_the_present_providers():
    rows = [row for path in RESULTS.glob("*.csv") for row in read(path)]
    known = {provider.name for provider in (*serving("cpu"), *serving("cuda"))}
    assert {row["provider"] for row in rows if "provider" in row} <= known
    assert all(row["commit"] and row["machine"] and row["command"] for row in rows)
    assert "512T" in search_table()


def test_plots_are_small():
    assert all(path.stat().st_size < 60_000 for path in (ROOT / "docs").glob("search-*.svg"))


def test_acceptance_writes_rows_and_a_table(tmp_path):
    cpu.main(
        ["acceptance", "--small", "--in-process", "--threads", "1", "--rounds", "3", "--out", str(tmp_path)],
    )
    rows = read(tmp_path / "acceptance-cpu-1t.csv")
    ours = [row for row in rows if row["provider"].startswith("revq")]
    assert len(ours) == 6 and all(len(row["rounds_ms"].split()) == 3 for row in ours)
    assert {"commit", "threads", "gflops_peak", "peers", "other_duplicate_share"} <= set(rows[0])
    assert all(float(row["farther_share"]) == float(row["other_duplicate_share"]) == 0 for row in ours)
    assert all(float(row["prepare_ms"]) > 0 for row in ours if row["provider"] != "revq")
    table = acceptance_table(tmp_path)
    assert SMALL[0].name in table and "torch.cdist" in table and "index build" in table
    assert "not measured" not in table  # the small cases have no goal
    assert "writes the rows" in acceptance_table(tmp_path / "nothing")


def test_goals_reached_and_missed():
    assert ratio_cell([5.0, 6.0, 7.0], 5.5) == "6x (5-7), goal 5.5x"
    assert ratio_cell([5.0, 6.0, 7.0], 6.5, "faiss") == "**6x (5-7) faiss, MISSES 6.5x**"
    assert ratio_cell([], 2.0) == "not measured" and ratio_cell([], None) == ""


def test_wide_suite_writes_rows_tables_and_plots(tmp_path, monkeypatch):
    small = [Case(f"d4 K{k}", 8, 1, k, 4) for k in (1024, 4096)] + [SMALL[2]._replace(offset=1000.0)]
    monkeypatch.setattr(cpu, "SEARCH", small)
    monkeypatch.setattr(cpu, "SEARCH_ROUNDS", 2)
    cpu.main(["search", "--providers", "torch.cdist", "faiss", "--no-memory", "--out", str(tmp_path)])
    rows = read(tmp_path / "search-cpu.csv")
    assert {row["name"] for row in rows} == {case.name for case in small}
    assert small[0].name in search_table(tmp_path)
    assert small[2].name in wrong_table(tmp_path) and small[0].name not in wrong_table(tmp_path)
    memory = [{"provider": "revq", "N": 8, "K": k, "d": 4, "peak_above_inputs_mb": 1.0} for k in (1024, 4096)]
    write("memory-cpu", memory, tmp_path)
    linked = cpu_plots(tmp_path, tmp_path / "page.md")
    names = ("throughput", "limit", "memory")
    assert not linked or all((tmp_path / f"search-cpu-{name}.svg").exists() for name in names)
    cpu.main(["search", "--minutes", "0", "--cases", "d4 K1024", "--providers", "--out", str(tmp_path)])
    assert all("not reached" in row["note"] for row in read(tmp_path / "search-cpu.csv"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_sees_a_distance_matrix():
    case = Case("", 4096, 1, 4096, 4)
    assert search_peak_mb(case, "revq", 1) < 8 < 64 < search_peak_mb(case, "torch.cdist", 1)
    assert search_peak_mb(case, "nobody", 1) == "KeyError: 'nobody'"


def test_windows_of_a_frame_are_tokens_of_crops():
    class Frames:
        def batches(self, size):
            yield torch.arange(2 * 3 * 12 * 12).reshape(2, 3, 12, 12).float()

    groups = torch.tensor([0, 5, 3 * 16 - 1])
    found = latents.tokens(Frames(), 4, groups)
    assert found.shape == (2 * 25, 3, 4)
    assert found[1, 0].tolist() == [1, 2, 3, 4]  # the window one column to the right
    assert found[5, 1].tolist() == [40, 41, 42, 43]  # the window one row below: row 1 + 2 of 12, columns 4 to 7
    assert found[25, 0, 0] == 3 * 144


def test_two_checkouts_are_compared_in_pairs(capsys, tmp_path):
    here = ["--old", str(ROOT), "--old-python", sys.executable, "--new", str(ROOT), "--out", str(tmp_path)]
    cpu.main(["compare", *here, "--small", "--pairs", "3", "--threads", "1", "--cases", "small"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 and all(line.startswith("512T, small: ") and " ms " in line for line in lines)
    rows = read_rows("compare-cpu", tmp_path)
    assert [row["what"] for row in rows] == ["search", "index", "index build"]
    assert all(row["pairs"] == "3" and row["commit"] == row["old_commit"] for row in rows)
    assert all(float(row["low"]) <= float(row["ratio"]) <= float(row["high"]) for row in rows)


def test_compare_refuses_a_folder_without_the_package(tmp_path):
    with pytest.raises(SystemExit, match="compare: "):
        compare.Worker(sys.executable, tmp_path)


def test_interval_of_a_median_has_its_coverage():
    assert compare.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert compare.interval(list(range(7))) == (0, 6)  # 1 - 2 / 2^7; without the extremes 1 - 16 / 2^7 = 0.875
    assert compare.interval(list(range(9))) == (1, 7)  # 1 - 20 / 2^9 = 0.961
