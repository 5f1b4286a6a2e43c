"""Measure the first passes' block sizes on the card at hand, and keep the best: ``python -m revq_kernels.triton.tune``.

Writes ``configs/<card>.json`` beside this file, which every later search on this card reads.  A candidate is timed only
after its indices were compared with those of the direct form.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from revq_kernels.triton import plan as planning
from revq_kernels.triton.blocks import FirstPassConfig, default_first_pass
from revq_kernels.triton.launches import search
from revq_kernels.triton.plan import Target, make_plan, target_of

SHAPES = (
    (256, 512, 16384, 4),
    (256, 256, 65536, 8),
    (65536, 1, 16384, 16),
    (16384, 1, 16384, 64),
    (8192, 1, 8192, 256),
)
"""(N, G, K, d) of what is tuned: one shape for each code dimension."""


def candidates(form: str, d: int, arch: str) -> Iterator[FirstPassConfig]:
    """The analytic default, and its neighbors in every block size."""
    default = default_first_pass(form, d, arch)
    yield default
    a, b, c, e = default.lanes
    for queries in (default.block_queries // 2, default.block_queries, default.block_queries * 2):
        for longer in (1, 2):
            for tiles in (default.cell_tiles // 2, default.cell_tiles, default.cell_tiles * 2):
                for warps in (4, 8):
                    changed = replace(
                        default, block_queries=queries, block_codes=default.block_codes * longer,
                        lanes=(a, b * longer, c, e), cell_tiles=max(tiles, default.unroll), num_warps=warps,
                    )  # fmt: skip
                    if changed != default and queries >= 16:
                        yield changed


def median_ms(call: Callable[[], object], rounds: int = 9) -> float:
    """Device time of one call: the median of ``rounds``."""
    times = []
    for _ in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def tune(form: str, shape: tuple[int, int, int, int], target: Target) -> tuple[FirstPassConfig, float, float]:
    """(the fastest configuration, its ms, the default's ms) for one shape.

    Raises:
        RuntimeError: if a configuration finds another index than the direct form.
    """
    rows, num_groups, num_codes, d = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, num_groups, d, device="cuda", generator=generator)
    codebook = torch.randn(num_groups, num_codes, d, device="cuda", generator=generator)
    indices, expected = (torch.empty(rows, num_groups, dtype=torch.int64, device="cuda") for _ in range(2))
    search(x, codebook, expected, None, None, make_plan(*shape, target, "direct"))
    times: dict[FirstPassConfig, float] = {}
    for candidate in candidates(form, d, target.arch):
        plan = make_plan(*shape, target, first_pass=candidate)
        try:
            search(x, codebook, indices, None, None, plan)
        except triton.runtime.errors.OutOfResources:
            continue
        if not torch.equal(indices, expected):
            raise RuntimeError(f"{candidate}: wrong index; nothing is tuned on a wrong kernel")
        times[candidate] = median_ms(lambda plan=plan: search(x, codebook, indices, None, None, plan))
        print(f"  {times[candidate]:8.3f} ms  {candidate}", flush=True)
    best = min(times, key=times.__getitem__)
    return best, times[best], next(iter(times.values()))


def main(arguments: list[str]) -> None:
    """Tune every form and shape, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", nargs="+", choices=planning.FORMS[:2], default=list(planning.FORMS[:2]))
    parser.add_argument("--d", type=int, nargs="+", help="code dimensions, of those that have a shape; default all")
    parser.add_argument("--out", type=Path, help="default: the file that later searches read")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("tune: needs a CUDA device, and torch sees none")
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    path = options.out or planning.measured_path(target.card)
    found: dict[str, dict[str, dict]] = {}
    for form in options.form:
        for shape in SHAPES:
            if options.d is None or shape[3] in options.d:
                print(f"{form}, N={shape[0]} G={shape[1]} K={shape[2]} d={shape[3]}", flush=True)
                best, ms, before = tune(form, shape, target)
                found.setdefault(form, {})[str(shape[3])] = {**asdict(best), "ms": ms, "default_ms": before}
    path.parent.mkdir(exist_ok=True, parents=True)
    temporary = path.with_suffix(".tmp")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    measured = {"card": target.card, "date": datetime.date.today().isoformat(), **versions, "configs": found}
    temporary.write_text(json.dumps(measured, indent=1) + "\n")
    temporary.replace(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
