"""How many codes are not those of the original in float64: the original's, its own under bfloat16 autocast, and ours there."""

import torch
from torch import Tensor, nn

import revq
from benchmarks.drop_in.case import DropInCase
from revq_kernels.interop.families.family import Call
from revq_kernels.interop.verify import Doubles, Run, doubled_call, in_double, plain_copy, run


def wrong_codes(case: DropInCase, training: bool) -> dict[str, str]:
    """Shares in per cent; empty where a call returns no codes, or in training mode (codes do not depend on it)."""
    names = ("wrong_original", "wrong_original_bf16", "wrong_patched_bf16")
    if training:
        return dict.fromkeys(names, "")
    call, module = Call(case.method, case.inputs()), case.build().eval()
    with Doubles():
        truth = _codes(run(in_double(module), doubled_call(call)))
    fast = plain_copy(module)
    revq.patch(fast, verify=False, verbose=False)
    found = [_codes(_run(which, call, low)) for which, low in ((module, False), (module, True), (fast, True))]
    if not truth.numel():
        return dict.fromkeys(names, "")
    return {name: f"{100 * (codes != truth).double().mean():.3f}" for name, codes in zip(names, found, strict=True)}


def _run(module: nn.Module, call: Call, bf16: bool) -> Run:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return run(plain_copy(module), call)


def _codes(done: Run) -> Tensor:
    whole = [value.flatten() for value in done.result.values() if value.dtype is torch.int64]
    return torch.cat(whole) if whole else torch.empty(0)
