"""The demo's searches with the kernels of another checkout and of this one, in turn, each in a process of its own.

python -m benchmarks.demo_search --before CHECKOUT [--rounds 9]

Searches are about 2 s of a demo (`benchmarks.demo_speed`); apart from the rest they can be measured better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.rows import provenance, write

HERE = Path(__file__).parent.parent

SEARCHES = """
import json, statistics, time, torch, revq_kernels
torch.manual_seed(0)
codebook, count = torch.randn(512, 256, 4), torch.zeros(512, 256, dtype=torch.int64)
step, latents = torch.randn(64, 512, 4), torch.randn(8214, 512, 4)

def milliseconds(call, calls):
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)

print(json.dumps({
    "a step's search and counts, ms": milliseconds(lambda: revq_kernels.quantize(step, codebook, count=count), 400),
    "all latents' search, ms": milliseconds(lambda: revq_kernels.nearest_code(latents, codebook), 9),
}))
"""


def main() -> None:
    """Run both, write a row each: medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a built checkout")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    source = provenance("python -m benchmarks.demo_search")
    checkouts = {"before": options.before.resolve(), "now": HERE}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(options.rounds):
        for name in list(checkouts)[:: -1 if number % 2 else 1]:
            found[name].append(_searches(checkouts[name]))
            print(name, found[name][-1], flush=True)
    rows = []
    for name, runs in found.items():
        medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        rows.append({"kernels": name, "of": commit(checkouts[name]), "rounds": options.rounds, **medians} | source)
    print(write("demo-search", rows))


def _searches(checkout: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.run(
        [sys.executable, "-c", SEARCHES], cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
