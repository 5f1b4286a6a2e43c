"""Other libraries' quantizers, original and patched by `revq.patch`: time, memory and wrong codes, for docs/drop-in.md.

python -m benchmarks.drop_in [--rounds 7] [--only TEXT ...] [--out DIR]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from revq_kernels.interop.doubles import Doubles, in_double, plain_copy
from revq_kernels.interop.family import Call
from torch import Tensor, nn

import revq
from benchmarks.harness.drop_in_cases import CASES, DropInCase
from benchmarks.harness.memory import peak_mb
from benchmarks.harness.rows import RESULTS, Row, Rows, provenance, read, version
from benchmarks.harness.timing import Call as TimedCall
from benchmarks.harness.timing import Clock, interleaved
from revq_kernels.interop.verify import Run, doubled_call, named_tensors, run

PACKAGES = ("diffusers", "transformers", "vector-quantize-pytorch", "encodec")


def main() -> None:
    """Measure, a row per quantizer and mode; rows are on disk as soon as they exist."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drop_in", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="quantizers whose name contains one; rows of the others stay"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    versions = " ".join(f"{package} {version(package)}" for package in PACKAGES)
    rows = Rows("drop-in", options.out, provenance("python -m benchmarks.drop_in") | {"packages": versions})
    cases = [case for case in CASES.values() if any(text in case.quantizer for text in options.only)]
    if len(cases) < len(CASES) and (options.out / "drop-in.csv").exists():
        again = {case.quantizer for case in cases}
        rows.rows = [row for row in read("drop-in", options.out) if row["quantizer"] not in again]
    for case in cases:
        found = measured(case, options.rounds)
        rows.add(found)
        print(*(f"{row['mode']}: {row['times']}x" for row in found), case.quantizer, flush=True)


def measured(case: DropInCase, rounds: int) -> list[Row]:
    """The rows of one quantizer: evaluation, and a training step if it trains."""
    return [_row(case, training, rounds) for training in ([False, True] if case.trains else [False])]


def _row(case: DropInCase, training: bool, rounds: int) -> Row:
    module, inputs = case.build().train(training), case.inputs()
    patched = plain_copy(module)
    report = revq.patch(patched, verify=False, verbose=False)
    assert report.entries and all(entry.patched for entry in report.entries), report
    calls: dict[str, TimedCall] = {
        name: lambda quantizer=quantizer: step(quantizer, case.method, inputs, training)
        for name, quantizer in (("original", module), ("patched", patched))
    }
    for call in calls.values():
        call()
    times = interleaved(calls, Clock(torch.device("cpu")), rounds, seconds_each=60)
    ratios = [before / after for before, after in zip(times["original"], times["patched"], strict=True)]
    peaks = {
        f"{name}_mb": peak_mb(_prepared_step, case.quantizer, training, name == "patched", torch.get_num_threads())
        for name in calls
    }
    return {
        "family": case.family,
        "quantizer": case.quantizer,
        "d": case.d,
        "K": case.codes,
        "N": case.vectors,
        "mode": "training step" if training else "evaluation",
        "rounds": rounds,
        "original_ms": round(statistics.median(times["original"]), 2),
        "patched_ms": round(statistics.median(times["patched"]), 2),
        "times": round(statistics.median(ratios), 2),
        "times_min": round(min(ratios), 2),
        "times_max": round(max(ratios), 2),
        **peaks,
        **wrong_codes(case, training),
    }


def step(module: nn.Module, method: str, inputs: tuple[Any, ...], training: bool) -> None:
    """One call; in training with the gradients of all its results."""
    if not training:
        with torch.no_grad():
            getattr(module, method)(*inputs)
        return
    module.zero_grad()
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    results = [value for _, value in named_tensors(getattr(module, method)(*leaves)) if value.requires_grad]
    if results:  # a codebook that follows moving averages has results without a gradient
        torch.autograd.backward([value.sum() for value in results])


def _prepared_step(quantizer: str, training: bool, patched: bool, threads: int) -> TimedCall:
    """The call whose peak memory is measured, after a small one that loads libraries and starts threads."""
    torch.set_num_threads(threads)
    case = CASES[quantizer]
    module, inputs = case.build().train(training), case.inputs()
    if patched:
        revq.patch(module, verify=False, verbose=False)
    one_sample = tuple(value[:1] if isinstance(value, torch.Tensor) else value for value in inputs)
    step(module, case.method, one_sample, training)
    return lambda: step(module, case.method, inputs, training)


def wrong_codes(case: DropInCase, training: bool) -> dict[str, str]:
    """Shares of codes, in per cent, that differ from those of the original in float64.

    Of the original, of the original under bfloat16 autocast, and of the patched module under bfloat16 autocast.  Empty
    if a call returns no codes, and in training mode, since the codes do not depend on it.
    """
    names = ("wrong_original", "wrong_original_bf16", "wrong_patched_bf16")
    if training:
        return dict.fromkeys(names, "")
    call, module = Call(case.method, case.inputs()), case.build().eval()
    with Doubles():
        truth = _codes(run(in_double(module), doubled_call(call)))
    patched = plain_copy(module)
    revq.patch(patched, verify=False, verbose=False)
    found = [_codes(_run(which, call, low)) for which, low in ((module, False), (module, True), (patched, True))]
    if not truth.numel():
        return dict.fromkeys(names, "")
    return {name: f"{100 * (codes != truth).double().mean():.3f}" for name, codes in zip(names, found, strict=True)}


def _run(module: nn.Module, call: Call, bf16: bool) -> Run:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return run(plain_copy(module), call)


def _codes(done: Run) -> Tensor:
    found = [value.flatten() for value in done.result.values() if value.dtype is torch.int64]
    return torch.cat(found) if found else torch.empty(0)


if __name__ == "__main__":
    main()
