"""Tune the block sizes of the first passes on this machine's card: ``python -m revq_kernels.triton.tune``.

Writes ``configs/<card>.json`` beside this file, which later searches on this card read.  A configuration is timed only
after its indices were compared with those of the direct form.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import triton

from revq_kernels.triton import plan as planning
from revq_kernels.triton.launches import search
from revq_kernels.triton.plan import FirstPassConfig, Target, default_first_pass, make_plan, target_of

SHAPES = (
    (256, 512, 16384, 4),
    (256, 256, 65536, 8),
    (65536, 1, 16384, 16),
    (16384, 1, 16384, 64),
    (8192, 1, 8192, 256),
)
"""The tuned problems as (N, G, K, d): one for each code dimension."""


def configurations(form: str, d: int, arch: str) -> Iterator[FirstPassConfig]:
    """The analytic default, and its neighbors in every block size."""
    default = default_first_pass(form, d, arch)
    yield default
    for queries in (default.block_queries // 2, default.block_queries, default.block_queries * 2):
        for factor in (1, 2):
            lanes = default.lanes._replace(outer_members=default.lanes.outer_members * factor)
            for tiles in (default.cell_tiles // 2, default.cell_tiles, default.cell_tiles * 2):
                for warps in (4, 8):
                    changed = replace(
                        default,
                        block_queries=queries,
                        block_codes=default.block_codes * factor,
                        lanes=lanes,
                        cell_tiles=max(tiles, default.unroll),
                        num_warps=warps,
                    )
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
    """(the fastest configuration, its time, the default's time), times in milliseconds, for one problem.

    Raises:
        RuntimeError: if a configuration returns another index than the direct form.
    """
    rows, num_groups, num_codes, d = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, num_groups, d, device="cuda", generator=generator)
    codebook = torch.randn(num_groups, num_codes, d, device="cuda", generator=generator)
    indices, expected = (torch.empty(rows, num_groups, dtype=torch.int64, device="cuda") for _ in range(2))
    search(x, codebook, expected, None, None, make_plan(*shape, target, "direct"))
    times: dict[FirstPassConfig, float] = {}
    for config in configurations(form, d, target.arch):
        plan = make_plan(*shape, target, first_pass=config)
        try:
            search(x, codebook, indices, None, None, plan)
        except triton.runtime.errors.OutOfResources:
            continue
        if not torch.equal(indices, expected):
            raise RuntimeError(f"{config}: returned a wrong index, so nothing is tuned")
        times[config] = median_ms(partial(search, x, codebook, indices, None, None, plan))
        print(f"  {times[config]:8.3f} ms  {config}", flush=True)
    best = min(times, key=times.__getitem__)
    return best, times[best], next(iter(times.values()))


def main(arguments: list[str]) -> None:
    """Tune every form and problem, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", nargs="+", choices=planning.FORMS[:2], default=list(planning.FORMS[:2]))
    parser.add_argument("--d", type=int, nargs="+", help="code dimensions to tune (those of SHAPES); default all")
    parser.add_argument("--out", type=Path, help="output file; default the one that later searches read")
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
