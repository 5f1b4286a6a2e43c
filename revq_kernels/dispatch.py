"""Which implementation runs, and why."""

from typing import NamedTuple

import torch
from torch import Tensor

from revq_kernels import native, triton
from revq_kernels.validation import COSINES, check_implementation, check_metric, check_search


class Choice(NamedTuple):
    """The implementation a call would run and the reason; prints as one line."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def variant(impl: str, tensor: Tensor, metric: str = "l2") -> str:
    """The operator overload (see ``ops.py``) that ``impl`` means for ``tensor``.

    An implementation asked for by name runs or raises; "auto" is the default overload, which takes the kernels of the
    tensor's device and the reference where there are none.

    Raises:
        ValueError: for an unknown name, or a device or metric that the implementation does not serve.
        NativeUnavailableError: for "native" without its library.
        TritonUnavailableError: for "triton" without Triton, or for CPU tensors without its interpreter.
    """
    check_implementation(impl)
    if impl == "reference":
        return "reference"
    if metric != "l2" and impl != "auto":
        raise ValueError(f"impl: metric={metric!r} has no kernel, expected 'auto' or 'reference', got {impl!r}")
    if impl == "triton":
        triton.require(tensor.device.type)
        return "triton"
    if impl == "native":
        if tensor.device.type != "cpu":
            raise ValueError(f"impl: 'native' runs CPU tensors, got a tensor on {tensor.device}")
        native.require()
    return "default"


def explain(x: Tensor, codebook: Tensor, *, metric: str = "l2", impl: str = "auto") -> Choice:
    """Say which implementation `nearest_code` and `quantize` would run for these arguments, and why.

    Args:
        x: ``[..., G, d]`` as for `nearest_code`.
        codebook: ``[G, K, d]``.
        metric: as for `nearest_code`, or "cosine" or "cosine_lookup" as for `FastChannelVQ`, which are an l2 search of
            normalized vectors.
        impl: as for `nearest_code`.

    Raises:
        ValueError, TypeError, NativeUnavailableError, TritonUnavailableError: as the call itself would.
    """
    check_search(x, codebook)
    if metric in COSINES:
        metric = "l2"
    check_metric(metric, x if metric == "diagonal" else None, x)  # x's place in the weight's stead
    chosen = variant(impl, x, metric)
    if chosen == "reference":
        return Choice("reference", "asked for by name; plain torch")
    if metric != "l2":
        return Choice("reference", f"no kernels for metric {metric!r}; plain torch")
    if chosen == "triton" or x.device.type == "cuda":
        failure = triton.unavailable(x.device.type)
        if failure is None:
            return Choice("triton", triton.kernels().explain(x, codebook))
        return Choice("reference", f"Triton's kernels cannot run: {failure}; plain torch")
    if x.device.type != "cpu":
        return Choice("reference", f"no kernels for device type {x.device.type!r}; plain torch")
    failure = native.load()
    if failure is not None:
        return Choice("reference", f"{failure}; plain torch")
    return Choice("native", f"CPU tensors; C++ for {native.isa()}, {torch.get_num_threads()} threads")
