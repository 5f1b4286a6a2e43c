"""The demo of another checkout and of this one, in turn, each in processes of their own: where its seconds go.

git worktree add /tmp/before COMMIT && (cd /tmp/before && REVQ_DEV=1 python setup.py build_ext --inplace)
python -m benchmarks.demo_speed --before /tmp/before [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import provenance, write

HERE = Path(__file__).parent.parent


def main() -> None:
    """Run both, write a row each: medians of the stages' seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a built checkout")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source, checkouts = provenance("python -m benchmarks.demo_speed"), {"before": options.before.resolve(), "now": HERE}
    rows = []
    for name, runs in in_turn(checkouts, options.rounds, stages).items():
        medians = {f"{stage} s": round(statistics.median(run[stage] for run in runs), 2) for stage in runs[0]}
        total = statistics.median(sum(run.values()) for run in runs)
        rows.append(
            {"demo": name, "of": commit(checkouts[name]), "rounds": options.rounds, **medians, "all s": round(total, 2)}
        )
    print(write("demo-speed", [row | source for row in rows]))


def in_turn(
    checkouts: dict[str, Path], rounds: int, measure: Callable[[Path], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """What ``measure`` finds in each checkout, by name, a value per round; each goes first in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(rounds):
        for name in list(checkouts)[:: -1 if number % 2 else 1]:
            found[name].append(measure(checkouts[name]))
            print(name, found[name][-1], flush=True)
    return found


def stages(checkout: Path) -> dict[str, float]:
    """Seconds of each stage of the demo, as it reports them."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "revq", "demo", "--out", folder + "/demo"],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(Path(folder, "demo", "demo.json").read_text())["seconds"]


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
