"""Every family's quantizer as it comes and patched, side by side: benchmarks/results/drop-in.csv.

python -m benchmarks.drop_in [--rounds 7] [--only TEXT] [--out FOLDER]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import revq
from benchmarks.drop_in.case import DropInCase
from benchmarks.drop_in.cases import CASES
from benchmarks.drop_in.memory import peak
from benchmarks.drop_in.wrong import wrong_codes
from benchmarks.harness.rows import RESULTS, Rows, provenance, version
from benchmarks.harness.timing import Clock, interleaved
from benchmarks.tables import read
from revq_kernels.interop.doubles import plain_copy
from revq_kernels.interop.verify import named_tensors

PACKAGES = ("diffusers", "transformers", "vector-quantize-pytorch", "encodec")


def main() -> None:
    """Measure, a row per quantizer and mode; rows are on disk as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="quantizers whose name contains one; the others' rows stay"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    versions = " ".join(f"{package} {version(package)}" for package in PACKAGES)
    rows = Rows("drop-in", options.out, provenance("python -m benchmarks.drop_in") | {"packages": versions})
    cases = [case for case in CASES if any(text in case.quantizer for text in options.only)]
    if len(cases) < len(CASES) and (options.out / "drop-in.csv").exists():
        again = {case.quantizer for case in cases}
        rows.rows = [row for row in read("drop-in", options.out) if row["quantizer"] not in again]
    for case in cases:
        rows.add(measured(case, options.rounds))
        print(
            *(f"{row['mode']}: {row['times']}x" for row in rows.rows[-1 - case.trains :]),
            case.quantizer,
            flush=True,
        )


def measured(case: DropInCase, rounds: int) -> list[dict[str, Any]]:
    """The rows of one quantizer."""
    modes = [False, True] if case.trains else [False]
    return [_row(case, training, rounds) for training in modes]


def _row(case: DropInCase, training: bool, rounds: int) -> dict[str, Any]:
    module, inputs = case.build().train(training), case.inputs()
    fast = plain_copy(module)
    report = revq.patch(fast, verify=False, verbose=False)
    assert report.entries and all(entry.patched for entry in report.entries), report
    calls = {
        name: lambda quantizer=quantizer: step(quantizer, case.method, inputs, training)
        for name, quantizer in (("original", module), ("patched", fast))
    }
    for call in calls.values():
        call()
    times = interleaved(calls, Clock(torch.device("cpu")), rounds, seconds_each=60)
    ratios = [before / after for before, after in zip(times["original"], times["patched"], strict=True)]
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
        "original_mb": peak(case.quantizer, training, patched=False),
        "patched_mb": peak(case.quantizer, training, patched=True),
        **wrong_codes(case, training),
    }


def step(module: nn.Module, method: str, inputs: tuple[Any, ...], training: bool) -> None:
    """One call; in training with the gradients of everything it returns."""
    if not training:
        with torch.no_grad():
            getattr(module, method)(*inputs)
        return
    module.zero_grad()
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    ]
    results = [value for _, value in named_tensors(getattr(module, method)(*leaves)) if value.requires_grad]
    if results:  # a codebook that moves by averages returns rows without a gradient
        sum(value.sum() for value in results).backward()


if __name__ == "__main__":
    main()
