"""Wrong arguments: the error names the argument, what was expected and what came."""

import pytest
import torch

import revq_kernels
from revq_kernels import count_codes_, explain, nearest_code, quantize, reset_codes_

X, CODEBOOK = torch.zeros(5, 3, 4), torch.zeros(3, 7, 4)
COUNT = torch.zeros(3, 7, dtype=torch.int64)

BAD_SEARCH = [
    (X.numpy(), CODEBOOK, TypeError, r"x: expected a torch.Tensor, got ndarray"),
    (X, [1], TypeError, r"codebook: expected a torch.Tensor, got list"),
    (X.double(), CODEBOOK, TypeError, r"x: expected dtype float32, bfloat16 or float16, got torch.float64"),
    (X.long(), CODEBOOK, TypeError, r"x: expected dtype .* got torch.int64"),
    (X, CODEBOOK.double(), TypeError, r"codebook: expected dtype .* got torch.float64"),
    (X, CODEBOOK[0], ValueError, r"codebook: expected \[G, K, d\], got shape \(7, 4\)"),
    (X, CODEBOOK[:, :0], ValueError, r"codebook: expected 1 <= K <= 2147483647 codes, got K=0"),
    (X[:, :0], CODEBOOK[:0], ValueError, r"codebook: expected .* G >= 1 .* got shape \(0, 7, 4\)"),
    (X[..., :0], CODEBOOK[..., :0], ValueError, r"codebook: expected .* d >= 1, got shape \(3, 7, 0\)"),
    (X[0, 0], CODEBOOK, ValueError, r"x: expected \[\.\.\., G=3, d=4\], got shape \(4,\)"),
    (X[:, :2], CODEBOOK, ValueError, r"x: expected .*G=3.* got 2 groups in shape \(5, 2, 4\)"),
    (X[..., :3], CODEBOOK, ValueError, r"x: expected .*d=4.* got d=3 in shape \(5, 3, 3\)"),
    (X.to("meta"), CODEBOOK, ValueError, r"x: expected the device of codebook, cpu, got meta"),
]


@pytest.mark.parametrize("function", [nearest_code, quantize, explain])
@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"), BAD_SEARCH, ids=[str(i) for i in range(len(BAD_SEARCH))]
)
def test_search_arguments(function, x, codebook, error, message):
    with pytest.raises(error, match=message):
        function(x, codebook)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (COUNT.float(), TypeError, r"count: expected dtype torch.int64, got torch.float32"),
        (COUNT[:2], ValueError, r"count: expected \[G=3, K=7\], got shape \(2, 7\)"),
        (COUNT[:, :6], ValueError, r"count: expected \[G=3, K=7\], got shape \(3, 6\)"),
        (COUNT[0], ValueError, r"count: expected \[G=3, K=7\], got shape \(7,\)"),
        (COUNT[:1].expand(3, 7), ValueError, r"count: expected contiguous memory of its own, got strides \(0, 1\)"),
        (COUNT.to("meta"), ValueError, r"count: expected the device of the other tensors, cpu, got meta"),
    ],
)
def test_count_argument(count, error, message):
    with pytest.raises(error, match=message):
        quantize(X, CODEBOOK, count=count)
    with pytest.raises(error, match=message):
        reset_codes_(CODEBOOK.clone(), count)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl: expected one of .*'native'.* got 'fast'"):
        nearest_code(X, CODEBOOK, impl="fast")


def test_native_requested_by_name_never_falls_back(monkeypatch, tmp_path):
    monkeypatch.setattr(revq_kernels.native, "_loaded", False)
    monkeypatch.setattr(revq_kernels.native, "_failure", None)
    monkeypatch.setattr(revq_kernels.native, "LIBRARY", tmp_path / "_C.so")
    with pytest.raises(revq_kernels.NativeUnavailableError, match=r"_C.so is not built.*pip install"):
        nearest_code(X, CODEBOOK, impl="native")
    assert explain(X, CODEBOOK).implementation == "reference"
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(revq_kernels.native, "_failure", None)
    with pytest.raises(revq_kernels.NativeUnavailableError, match=r"_C.so does not load"):
        nearest_code(X, CODEBOOK, impl="native")


def test_native_takes_cpu_tensors_only():
    with pytest.raises(ValueError, match="impl: 'native' runs CPU tensors, got a tensor on meta"):
        nearest_code(X.to("meta"), CODEBOOK.to("meta"), impl="native")


def test_count_codes_arguments(impl):
    count = COUNT.clone()
    with pytest.raises(TypeError, match=r"indices: expected dtype torch.int64, got torch.int32"):
        count_codes_(count, torch.zeros(5, 3, dtype=torch.int32), impl=impl)
    with pytest.raises(ValueError, match=r"count: expected \[G=2, K\], got shape \(3, 7\)"):
        count_codes_(count, torch.zeros(5, 2, dtype=torch.int64), impl=impl)
    for wrong in (-1, 7):
        with pytest.raises((IndexError, RuntimeError), match=r"index|indices|scatter"):
            count_codes_(count, torch.cat([torch.ones(4, 3, dtype=torch.int64), torch.full((1, 3), wrong)]), impl=impl)
    assert count.sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, r"noise: expected a standard deviation >= 0, got -0.1"),
        ({"max_fraction": 1.5}, r"max_fraction: expected a share between 0 and 1, got 1.5"),
        ({"pairing": "random"}, r"pairing: expected 'paper' or 'release', got 'random'"),
    ],
)
def test_reset_options(options, message):
    with pytest.raises(ValueError, match=message):
        reset_codes_(CODEBOOK.clone(), COUNT, **options)


@pytest.mark.parametrize("variant", ["default", "reference"])
def test_direct_operator_calls_do_not_read_outside_their_tensors(variant):
    assert revq_kernels.native.load() is None
    search, gradient = (getattr(getattr(torch.ops.revq, name), variant) for name in ("nearest_code", "segment_sum"))
    indices = torch.zeros(5, 3, dtype=torch.int64)
    for call in (
        lambda: search(X[..., :3], CODEBOOK),
        lambda: search(X[:, :2], CODEBOOK),
        lambda: search(X[:, :0], CODEBOOK[:0]),
        lambda: search(X, CODEBOOK[:, :0]),
        lambda: gradient(X, indices + 9, 7),
        lambda: gradient(X, indices - 1, 7),
        lambda: gradient(X[:, :0], indices[:, :0], 7),
        lambda: gradient(X[:0], indices[:0], 0),
        lambda: gradient(X, indices[:, :2], 7),
        lambda: getattr(torch.ops.revq.count_codes_, variant)(torch.zeros(2, 4, dtype=torch.int64), indices),
    ):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            call()


def test_only_dense_tensors():
    with pytest.raises(TypeError, match=r"x: expected a dense torch.Tensor, got layout torch.sparse_coo"):
        nearest_code(X.to_sparse(), CODEBOOK)
