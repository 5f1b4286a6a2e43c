"""The fuzz test itself: its truth is the contract, it finds a planted wrong index, its problems are reproducible."""

import csv
import subprocess

import pytest
import torch

from benchmarks.harness.machine import NoCompilerError, fma_gflops
from benchmarks.harness.report import soak_table
from revq_kernels import native
from revq_kernels.testing.problems import contract_index, problems
from tests.fuzz import adversarial_problems, soak

pytestmark = [
    pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    try:
        soak._compiled()
    except (NoCompilerError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiled truth: {error}")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_compiled_search_is_the_contract():
    for problem in problems():
        if problem.x.numel():
            x = problem.x.reshape(-1, *problem.codebook.shape[::2])
            found = soak.compiled_search(x, problem.codebook, 2)
            assert torch.equal(found, contract_index(x, problem.codebook)), problem.name
    assert fma_gflops(1, 0.01) > 0.1


def test_soak_passes_and_names_the_seed_of_a_wrong_index(tmp_path, monkeypatch):
    few = ["--pairs", "1e12", "--most-pairs", "2e5", "--problems", "40", "--threads", "1", "--out", str(tmp_path)]
    soak.main(few)
    (row,) = read(tmp_path / "soak-cpu.csv")
    assert row["wrong"] == "0" and row["problems"] == "40" and "index, refit" in row["compared"]
    right = soak.nearest_code
    monkeypatch.setattr(soak, "nearest_code", lambda x, c, **o: right(x, c, **o) ^ (c.shape[1] > 1000))
    with pytest.raises(SystemExit, match=r"WRONG: native.* seed 4[0-9]+"):
        soak.main([*few, "--seed", "40"])
    assert "WRONG" in soak_table(tmp_path) and len(read(tmp_path / "soak-cpu.csv")) == 1  # the latest row alone


def test_problems_are_reproducible_and_keep_their_size():
    kinds = set()
    for seed in range(200):
        problem, again = (adversarial_problems.problem(seed, 20000, 40000) for _ in range(2))
        assert torch.equal(problem.x.nan_to_num(), again.x.nan_to_num()) and str(problem) == str(again)
        assert problem.pairs * problem.x.shape[2] <= 40000 or problem.pairs == 1, problem
        kinds.add(problem.kind)
    assert kinds == set(adversarial_problems.KINDS)
