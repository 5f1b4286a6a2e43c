"""The benchmarks' harness: data, checks before timing, rows, and a dry run of the GPU's command on a CPU."""

import csv
import dataclasses
import shutil
import subprocess

import pytest
import torch

from benchmarks import gpu, train_step
from benchmarks.harness import correctness, measure
from benchmarks.harness.cases import PAPER, SMALL, Case
from benchmarks.harness.correctness import Float64Truth
from benchmarks.harness.gpu_rates import operands, product
from benchmarks.harness.machine import roofline
from benchmarks.harness.report import gpu_section
from benchmarks.harness.rows import Rows
from benchmarks.harness.timing import Clock
from benchmarks.providers import BRUTE_FORCE, PROVIDERS, serving
from benchmarks.providers.plain_torch import cdist, direct, expansion, expansion_chunked
from revq_kernels import nearest_code
from revq_kernels.testing.exhaustive import PAIRS_PER_CHUNK, exhaustive_search
from revq_kernels.testing.problems import problems

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_exhaustive_search_is_the_contract(monkeypatch):
    monkeypatch.setitem(PAIRS_PER_CHUNK, "cpu", 3000)  # several chunks of each kind
    for problem in problems():
        if problem.x.numel():
            x = problem.x.reshape(-1, *problem.codebook.shape[::2])
            truth = nearest_code(x, problem.codebook, impl="reference")
            assert torch.equal(exhaustive_search(x, problem.codebook).index, truth), problem.name


def test_shares_of_wrong_indices():
    codebook = torch.tensor([[[0.0], [1.0], [1.0], [4.0]]])
    x = torch.tensor([[[0.1]], [[1.1]], [[1.1]], [[3.9]], [[3.9]]])
    truth = Float64Truth(x, codebook)
    assert truth.wrong_shares(torch.tensor([[0], [1], [1], [3], [3]])) == (0, 0)
    assert truth.wrong_shares(torch.tensor([[0], [2], [1], [3], [3]])) == (0, pytest.approx(1 / 5))
    assert truth.wrong_shares(torch.tensor([[1], [2], [1], [0], [9]])) == (pytest.approx(3 / 5), pytest.approx(1 / 5))


def test_data():
    for case in SMALL:
        (x, codebook), (again, _) = case.tensors(), case.tensors()
        assert x.shape == (case.N, case.G, case.d) and codebook.shape == (case.G, case.K, case.d)
        assert x.is_contiguous() and codebook.is_contiguous() and torch.equal(x, again)
    _, codebook = Case("duplicates", 1, 2, 1000, 4, kind="duplicates").tensors()
    assert len(codebook[1].unique(dim=0)) == 800
    x, _ = Case("correlated", 20000, 1, 1, 4, kind="correlated", offset=10.0).tensors()
    assert torch.corrcoef(x[:, 0].T)[1, 2] == pytest.approx(0.7, abs=0.03)
    assert x.mean() == pytest.approx(10, abs=0.05) and x.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("function", [cdist, expansion_chunked, expansion, direct])
def test_torch_providers_find_nearest_codes(function):
    x, codebook = Case("", 20, 5, 70, 6).tensors()
    assert torch.equal(function(x, codebook), nearest_code(x, codebook, impl="reference"))


def test_peers_that_are_installed_find_nearest_codes():
    peers = [provider for provider in serving("cpu") if provider.needs and not provider.missing]
    for provider in peers:
        if provider.name != "KeOps":  # compiles for some ten seconds
            x, codebook = Case("", 20, 3, 70, 4).tensors()
            assert torch.equal(provider.search(x, codebook), nearest_code(x, codebook)), provider.name
    if not peers:
        pytest.skip("no peer is installed: pip install '.[bench]'")


def test_unknown_provider_is_named():
    with pytest.raises(ValueError, match="nobody"):
        serving("cpu", ["nobody"])
    assert {"revq", "torch.cdist", "addmm, chunked", "KeOps", "flash-kmeans"} <= {p.name for p in serving("cuda")}


def test_roofline_of_the_paper_shapes():
    limits = [roofline(case, "NVIDIA H200").tensor_core_search for case in PAPER]
    assert limits == [pytest.approx(expected, rel=0.02) for expected in (0.075, 0.15, 0.50)]
    assert roofline(PAPER[0], "another card") is None


def test_dry_run_writes_rows_with_every_column(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--out", str(tmp_path), "--providers", "torch.cdist", "faiss"])
    named = {"date", "commit", "machine", "torch", "python", "command", "card"}
    for name in ("correctness", "rates", "search", "train"):
        with (tmp_path / f"{name}-gpu-dry-run.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and named <= set(rows[0]) and all(None not in row.values() for row in rows)
        if name == "search":
            assert {row["provider"] for row in rows} == {"revq", "torch.cdist", "faiss"}
            assert {row["name"] for row in rows} == {case.name for case in SMALL}
            ours = [row for row in rows if row["provider"] == "revq"]
            assert all(float(row["median_ms"]) > 0 and float(row["farther_share"]) == 0 for row in ours)
            assert set(measure.MEASURED) <= set(rows[0])
        if name == "train":
            assert [row["equal"] for row in rows] == ["True", "", "True"], rows
    assert (tmp_path / "rounding-gpu-dry-run.npz").exists()
    assert "none wrong" in capsys.readouterr().out


def test_cases_after_the_time_limit_leave_rows_that_say_so(tmp_path):
    gpu.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0", "--parts", "search", "--providers"])
    with (tmp_path / "search-gpu-dry-run.csv").open(newline="") as file:
        assert all("not reached" in row["note"] for row in csv.DictReader(file))


def test_training_step_writes_rows(tmp_path):
    train_step.main(["--device", "cpu", "--small", "--rounds", "2", "--out", str(tmp_path)])
    with (tmp_path / "train-cpu.csv").open(newline="") as file:
        equal = {row["mode"]: row["equal"] for row in csv.DictReader(file)}
    assert equal == {"eager": "True", "graph": "", "compile": "True"}


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_a_wrong_index_ends_the_run_before_anything_is_timed(tmp_path, monkeypatch, place):
    def wrong(x, codebook, **options):
        indices = nearest_code(x, codebook, **options)
        if options.get("impl") != "reference" and indices.numel():
            indices.view(-1, codebook.shape[0])[place] ^= 1
        return indices

    monkeypatch.setattr(correctness, "nearest_code", wrong)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "wrong" in str(ended.value.code) and not list(tmp_path.glob("search*"))
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "nearest_code", wrong)
    with pytest.raises(SystemExit, match="512T, small: 1 of 64 indices are wrong"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("search*"))


def test_wrong_index_of_ours_raises_and_failure_of_a_peer_is_a_note(monkeypatch):
    case, clock = SMALL[0], Clock(CPU)
    broken = dataclasses.replace(PROVIDERS["torch.cdist"], name="broken", call=lambda x, codebook: 1 / 0)
    wrong = dataclasses.replace(PROVIDERS["torch.cdist"], name="wrong", call=lambda x, c: nearest_code(x, c) ^ 1)
    rows = {row["provider"]: row for row in measure.measure(case, [BRUTE_FORCE, broken, wrong], clock, 2)}
    assert rows["broken"]["note"].startswith("ZeroDivisionError") and rows["broken"]["median_ms"] == ""
    assert rows["wrong"]["farther_share"] == 1 and rows["wrong"]["median_ms"] > 0
    bad = dataclasses.replace(BRUTE_FORCE, call=wrong.call)
    monkeypatch.setattr(measure, "BRUTE_FORCE", bad)
    with pytest.raises(SystemExit, match="wrong"):
        measure.measure(case, [bad], clock, 2)


def test_rounding_vectors_are_exact_in_float64():
    left, right, start = operands((16, 16, 16), 8)
    exact = torch.baddbmm(start.double(), left.double(), right.double())
    backwards = torch.baddbmm(start.double(), left.flip(2).double(), right.flip(1).double())
    assert torch.equal(exact, backwards)  # the sum is exact in every order
    got = product(left, right, start, "float32").double()
    assert not torch.equal(got, exact) and torch.allclose(got, exact, rtol=1e-4, atol=1e-2)


def test_report_of_a_gpu(tmp_path):
    assert "No GPU was at hand" in gpu_section(tmp_path)
    named = dict.fromkeys(("card", "driver", "cuda", "triton", "machine", "date", "commit", "command"), "example")
    rows = Rows("search-gpu-example", tmp_path, named | {"threads": 2, "torch": "0", "python": "0"})
    rows.add(measure.measure(SMALL[2], serving("cpu", ["torch.cdist", "faiss"]), Clock(CPU), 2))
    (tmp_path / "docs").mkdir()
    text = gpu_section(tmp_path, tmp_path / "docs" / "page.md")
    assert "512T, offset 100, small" in text and "torch.cdist" in text
    assert (tmp_path / "docs" / "search-gpu-example.svg").exists() == ("svg" in text)


@pytest.mark.parametrize(("name", "opcode"), [("min, 3 x int32", "VIMNMX3"), ("min, 3 x half2", "VHMNMX")])
def test_rate_kernels_hold_the_instruction_they_name(name, opcode, tmp_path):
    triton = pytest.importorskip("triton")
    from pathlib import Path

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    disassembler = shutil.which("cuobjdump", path=Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    if disassembler is None:
        pytest.skip("no cuobjdump in this Triton")
    from benchmarks.harness import gpu_rate_kernels as kernels

    constants = {"ASM": kernels.MINIMA[name], "CONSTRAINTS": "=r,r,r,r", "FLOAT": False, "BLOCK": 2048}
    source = ASTSource(kernels.elementwise_rate, {"out": "*i32", "steps": "i32"}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([disassembler, "-sass", binary], check=True, capture_output=True, text=True).stdout
    assert text.count(opcode) == 32
