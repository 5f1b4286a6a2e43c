"""The demo of another checkout and of this one, at once, each stopped while the other runs: where its seconds go, and how
many of them are the search's.

git worktree add /tmp/before COMMIT && (cd /tmp/before && REVQ_DEV=1 python setup.py build_ext --inplace)
python -m benchmarks.demo_speed --before /tmp/before [--rounds 5]

Turns of half a second give both the same machine, but not the same luck with memory that malloc returns to the system and
asks for again (`revq/allocator.py`): once each demo does as it does, once both keep what they free, so that little but
the search differs.  The search's own share, operators and their gradients, is measured inside the demo: CPU seconds of
the thread that calls them, which do not run while the demo is stopped.
"""

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.demo_search import HERE, commit
from benchmarks.harness.rows import provenance, write

TURN = 0.5  # seconds
POLL = 0.01  # seconds
FIRST_STAGE, STAGES = "load", {"Encoding": "encode", "Training": "train and evaluate"}
"""Stages, the later ones by the first word of the line that announces them."""
MEMORY = {
    "as each does": {},
    "kept by both": {"MALLOC_MMAP_THRESHOLD_": str(1 << 27), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
}
"""What becomes of freed memory, and the environment that says so."""
SEARCH = "search, its counts and gradients"
DEMO = """
import pathlib, sys, time
from revq_kernels import ops

spent, overload = 0.0, ops.overload

def timed_overload(name, variant):
    operator = overload(name, variant)
    def call(*arguments):
        global spent
        begin = time.thread_time()
        try:
            return operator(*arguments)
        finally:
            spent += time.thread_time() - begin
    return call

ops.overload = timed_overload
from revq.cli import main
code = main(["demo", "--out", sys.argv[1]])
pathlib.Path(sys.argv[1], "spent").write_text(str(spent))
sys.exit(code)
"""


def main() -> None:
    """Run both, write a row per stage: medians over the rounds, of seconds and of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a built checkout")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = provenance("python -m benchmarks.demo_speed")
    checkouts = {"before": options.before.resolve(), "now": HERE}
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {memory: [] for memory in MEMORY}
    for number in range(options.rounds):
        for memory, environment in MEMORY.items():
            rounds[memory].append(run_in_turns(checkouts, environment, first="now" if number % 2 else "before"))
            print(memory, rounds[memory][-1], flush=True)
    rows = []
    for memory, stage in itertools.product(MEMORY, (FIRST_STAGE, *STAGES.values(), "all", SEARCH)):
        before, now = ([run[name][stage] for run in rounds[memory]] for name in checkouts)
        rows.append(
            {
                "freed memory": memory,
                "stage": stage,
                "before": commit(options.before),
                "before s": round(statistics.median(before), 2),
                "now s": round(statistics.median(now), 2),
                "now / before": round(statistics.median(n / b for n, b in zip(now, before, strict=True)), 3),
                "shorter now": sum(n < b for n, b in zip(now, before, strict=True)),
                "rounds": options.rounds,
            }
        )
    print(write("demo-speed", [row | source for row in rows]))


def run_in_turns(checkouts: dict[str, Path], environment: dict[str, str], first: str) -> dict[str, dict[str, float]]:
    """Seconds of each stage, and of all, that each checkout's demo had the machine, and those of the search."""
    with tempfile.TemporaryDirectory() as folder:
        demos = {
            name: Demo(checkouts[name], environment, Path(folder, name))
            for name in sorted(checkouts, key=lambda n: n != first)
        }
        try:
            while running := [demo for demo in demos.values() if not demo.ended]:
                for demo in running:
                    demo.turn()
        finally:
            for demo in demos.values():
                demo.process.kill()
                demo.process.wait()
        return {name: demos[name].report() for name in checkouts}


class Demo:
    """A demo in a process of its own, which runs while `turn` does."""

    def __init__(self, checkout: Path, environment: dict[str, str], out: Path) -> None:
        self.seconds = dict.fromkeys((FIRST_STAGE, *STAGES.values()), 0.0)
        self.stage, self.ended, self.out = FIRST_STAGE, False, out
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", DEMO, str(out)],
            cwd=checkout,
            env=os.environ | environment | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.process.send_signal(signal.SIGSTOP)
        os.set_blocking(self.process.stdout.fileno(), False)

    def turn(self) -> None:
        """Run for half a second, or to the end."""
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        now = begin
        while now < begin + TURN and not self.ended:
            time.sleep(POLL)
            self.ended = self.process.poll() is not None
            then, now = now, time.perf_counter()
            self.seconds[self.stage] += now - then
            for line in (self.process.stdout.read() or b"").decode().splitlines():
                self.stage = STAGES.get(line.split(" ")[0], self.stage)
        if not self.ended:
            self.process.send_signal(signal.SIGSTOP)
        elif self.process.returncode != 0:
            raise RuntimeError(f"the demo in {self.out} ended with {self.process.returncode}")

    def report(self) -> dict[str, float]:
        """Seconds of the stages, of all, and of the search."""
        search = float((self.out / "spent").read_text())
        return self.seconds | {"all": sum(self.seconds.values()), SEARCH: search}


if __name__ == "__main__":
    main()
