"""Checks arguments, one function per kind of argument.  Messages name the argument, what was expected and what came."""

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CODES = MAX_DIM = 2**31 - 1
METRICS = ("l2", "inner_product", "diagonal")
COSINES = ("cosine", "cosine_lookup")
"""The metrics that only `FastChannelVQ` accepts: it normalizes the vectors and then searches with l2."""
IMPLEMENTATIONS = ("auto", "native", "triton", "reference")


def check_search(x: Tensor, codebook: Tensor) -> None:
    """x ``[..., G, d]`` against codebook ``[G, K, d]``."""
    _check_dtype("x", x)
    check_codebook(codebook)
    shape, (num_groups, _, code_dim) = x.shape, codebook.shape
    if len(shape) < 2:
        raise ValueError(f"x: expected [..., G={num_groups}, d={code_dim}], got shape {tuple(shape)}")
    if shape[-2] != num_groups:
        raise ValueError(
            f"x: expected [..., G={num_groups}, d={code_dim}] for codebook {tuple(codebook.shape)}, "
            f"got {shape[-2]} groups in shape {tuple(shape)}"
        )
    if shape[-1] != code_dim:
        raise ValueError(
            f"x: expected [..., G={num_groups}, d={code_dim}] for codebook {tuple(codebook.shape)}, "
            f"got d={shape[-1]} in shape {tuple(shape)}"
        )
    _check_same_device("x", x, "codebook", codebook)


def check_metric(metric: str, weight: Tensor | None, x: Tensor) -> None:
    """A metric of `nearest_code`, with a weight of x's shape for "diagonal" and none for the others."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    if (weight is not None) != (metric == "diagonal"):
        expected, came = ("None", "one") if weight is not None else ("a tensor of x's shape", "None")
        raise ValueError(f"weight: expected {expected} for metric={metric!r}, got {came}")
    if weight is not None:
        _check_dtype("weight", weight)
        if weight.shape != x.shape:
            raise ValueError(f"weight: expected x's shape {tuple(x.shape)}, got {tuple(weight.shape)}")
        _check_same_device("weight", weight, "x", x)


def check_quantizer(num_codes: int, code_dim: int, num_groups: int, metric: str, impl: str) -> None:
    """The sizes, the metric and the implementation of a `FastChannelVQ`."""
    for name, size in (("num_codes", num_codes), ("code_dim", code_dim), ("num_groups", num_groups)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
        if size > MAX_CODES:  # also of d and G: K*d*G elements would fit no memory
            raise ValueError(f"{name}: expected at most {MAX_CODES}, got {size}")
    if metric not in METRICS + COSINES:
        raise ValueError(f"metric: expected one of {METRICS + COSINES}, got {metric!r}")
    check_implementation(impl)
    if metric in ("inner_product", "diagonal") and impl in ("native", "triton"):
        raise ValueError(f"impl: metric={metric!r} has no kernel, expected 'auto' or 'reference', got {impl!r}")


def check_codebook(codebook: Tensor) -> None:
    """codebook ``[G, K, d]`` of a floating type with at least one code."""
    _check_dtype("codebook", codebook)
    shape = codebook.shape
    if len(shape) != 3:
        raise ValueError(f"codebook: expected [G, K, d], got shape {tuple(shape)}")
    num_groups, num_codes, code_dim = shape
    if num_groups < 1 or code_dim < 1:
        raise ValueError(f"codebook: expected [G, K, d] with G >= 1 and d >= 1, got shape {tuple(shape)}")
    if code_dim > MAX_DIM:
        raise ValueError(f"codebook: expected d <= {MAX_DIM} elements per code, got d={code_dim}")
    if not 1 <= num_codes <= MAX_CODES:
        raise ValueError(f"codebook: expected 1 <= K <= {MAX_CODES} codes, got K={num_codes}")


def check_index_query(x: Tensor, shape: tuple[int, int, int]) -> None:
    """x ``[..., G, d]`` against the shape of a `CodebookIndex`."""
    _check_dtype("x", x)
    num_groups, _, code_dim = shape
    if x.dim() < 2 or tuple(x.shape[-2:]) != (num_groups, code_dim):
        raise ValueError(
            f"x: expected [..., G={num_groups}, d={code_dim}] for an index of {shape}, got shape {tuple(x.shape)}"
        )
    if x.device.type != "cpu":
        raise ValueError(f"x: expected a CPU tensor, as the index is, got one on {x.device}")


def check_count(count: Tensor, num_groups: int, num_codes: int | None, like: Tensor) -> None:
    """count int64 ``[G, K]`` on ``like``'s device; K is left open when ``num_codes`` is None."""
    check_tensor("count", count)
    if count.dtype != torch.int64:
        raise TypeError(f"count: expected dtype torch.int64, got {count.dtype}")
    fits = count.dim() == 2 and count.shape[0] == num_groups and num_codes in (None, count.shape[1])
    if not fits:
        codes = "K" if num_codes is None else f"K={num_codes}"
        raise ValueError(f"count: expected [G={num_groups}, {codes}], got shape {tuple(count.shape)}")
    if not count.is_contiguous():
        raise ValueError(f"count: expected contiguous memory of its own, got strides {count.stride()}")
    _check_same_device("count", count, "the other tensors", like)


def check_counted(count: Tensor) -> None:
    """count int64 ``[G, K]``, an argument that is only read (such as the counts of an epoch), on any device."""
    check_tensor("count", count)
    if count.dtype != torch.int64:
        raise TypeError(f"count: expected dtype torch.int64, got {count.dtype}")
    if count.dim() != 2 or count.shape[1] < 1:
        raise ValueError(f"count: expected [G, K] with K >= 1, got shape {tuple(count.shape)}")


def check_segments(values: Tensor, indices: Tensor, num_codes: int) -> None:
    """values ``[..., G, d]`` with indices ``[..., G]`` on one device."""
    _check_dtype("values", values)
    check_indices(indices)
    if values.dim() < 2 or values.shape[-2] < 1 or values.shape[-1] < 1 or values.shape[:-1] != indices.shape:
        raise ValueError(
            f"values: expected [..., G, d] with G, d >= 1 for indices {tuple(indices.shape)}, got {tuple(values.shape)}"
        )
    if values.shape[-1] > MAX_DIM:
        raise ValueError(f"values: expected d <= {MAX_DIM}, got shape {tuple(values.shape)}")
    _check_same_device("indices", indices, "values", values)
    if not 1 <= num_codes <= MAX_CODES:
        raise ValueError(f"num_codes: expected 1 <= K <= {MAX_CODES}, got {num_codes}")


def check_indices(indices: Tensor) -> None:
    """indices int64 ``[..., G]``."""
    check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected dtype torch.int64, got {indices.dtype}")
    if indices.dim() < 1:
        raise ValueError("indices: expected [..., G], got a scalar")


def check_index_range(indices: Tensor, num_codes: int) -> None:
    """Every index is a code: 0 <= index < K.  Reads the data, so on a GPU the host waits for the device.

    Under torch.compile and on the meta device there is no data to read, and nothing is checked.
    """
    if torch.compiler.is_compiling() or indices.is_meta:
        return
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_codes):
        raise ValueError(
            f"indices: expected values in [0, K={num_codes}), got {int(indices.min())} to {int(indices.max())}"
        )


def check_implementation(impl: str) -> None:
    """``impl`` is a known name."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")


def check_reset(noise: float, max_fraction: float, pairing: str) -> None:
    """The options of `reset_codes_`."""
    if not noise >= 0:
        raise ValueError(f"noise: expected a standard deviation >= 0, got {noise}")
    if not 0 <= max_fraction <= 1:
        raise ValueError(f"max_fraction: expected a share between 0 and 1, got {max_fraction}")
    if pairing not in ("paper", "release"):
        raise ValueError(f"pairing: expected 'paper' or 'release', got {pairing!r}")


def check_tensor(name: str, value: object) -> None:
    """``value`` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense torch.Tensor, got layout {value.layout}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name}: expected dtype float32, bfloat16 or float16, got {tensor.dtype}")


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {tensor.device}")
