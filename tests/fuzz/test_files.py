"""Short runs of the proofs about files, and that they find planted faults.

In one process of its own: it forks, which only a process with one thread can do.
"""

import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz import corruptions

PROGRAM = """
import sys
from tests.fuzz import corruptions, hostile, kills
import revq.data.atomic, revq.data.tensor_file

codes = [
    kills.main(["--events", "2", "--times", "1"]),
    corruptions.main(["--count", "60"]),
    hostile.main(["--most", "25"]),
]
revq.data.atomic._remove_leftovers = lambda target: None
codes.append(kills.main(["--verbs", "tokenize", "--events", "4", "--times", "0"]))
revq.data.tensor_file.zlib.crc32 = lambda *data: 0
codes.append(corruptions.main(["--count", "40"]))
print(codes)
"""


def test_short_runs_and_planted_faults():
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=500, check=False
    )
    output = done.stdout + done.stderr
    assert "12 kills, 0 failures" in output and "60 corruptions, 0 silent or with a traceback" in output, output
    assert "25 cases, 0 wrong" in output, output
    assert "files differ" in output and "silent'" in output, f"planted faults:\n{output}"
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 1, 1]", output


def test_every_change_changes_something():
    rng, data = random.Random(0), bytes(range(48, 148)) * 3
    for change in corruptions.CHANGES:
        assert any(change(data, rng) != data for _ in range(20)), change
