"""The operators of ``ops.py`` in Triton; ``ops.py`` has checked the arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revq_kernels.triton.accumulate import count_codes_, segment_sum, segment_sum_atomic
from revq_kernels.triton.certificate import tensor_cores_keep_the_bound
from revq_kernels.triton.launches import search
from revq_kernels.triton.plan import Plan, make_plan, target_of


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """x ``[..., G, d]``, codebook ``[G, K, d]`` -> indices int64 ``[..., G]``."""
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    if x.numel():
        search(x, codebook, indices.view(-1, x.shape[-2]), None, None, plan_for(x, codebook))
    return indices


def quantize(x: Tensor, codebook: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """Search, gather and count: (quantized ``[..., G, d]`` in x's dtype, indices int64 ``[..., G]``).

    ``count`` int64 ``[G, K]``, if given, is increased by how often each code was chosen.
    """
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows = (-1, *x.shape[-2:])
        search(x, codebook, indices.view(rows[:2]), quantized.view(rows), count, plan_for(x, codebook))
    return quantized, indices


def plan_for(x: Tensor, codebook: Tensor) -> Plan:
    """The plan that `nearest_code` and `quantize` run for these arguments."""
    problem = (x.shape[:-2].numel(), *codebook.shape)
    target = target_of(x.device)
    contiguous = codebook.is_contiguous()
    plan = make_plan(*problem, target, contiguous=contiguous)
    if plan.form == "tensor_core" and x.is_cuda and not tensor_cores_keep_the_bound(x.device):
        plan = make_plan(*problem, target, "fma", contiguous=contiguous)._replace(
            reason="the tensor cores are not proven to keep the bound"
        )
    return plan


def explain(x: Tensor, codebook: Tensor) -> str:
    """The plan in one line."""
    plan = plan_for(x, codebook)
    return f"{plan.form} form on {target_of(x.device).card} ({plan.reason}); {plan.splits} splits of the codes"


KERNELS: dict[str, Callable[..., Any]] = {
    "nearest_code": nearest_code,
    "quantize": quantize,
    "count_codes_": count_codes_,
    "segment_sum": segment_sum,
    "segment_sum_atomic": segment_sum_atomic,
}
"""Every operator that has a Triton implementation, by its name in ``ops.py``."""
