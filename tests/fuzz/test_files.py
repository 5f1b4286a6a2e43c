"""Short runs of the proofs about files, and that they find planted faults.

In one process of its own: it forks, which only a process with one thread can do.
"""

import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz import corruptions

PROGRAM = """
import shutil, sys, tempfile
from pathlib import Path
import torch
from tests.fuzz import corruptions, hostile, kills
import revq.data.atomic, revq.data.tensor_file

torch.set_num_threads(1)
made = Path(tempfile.mkdtemp(dir=sys.argv[1]))
verbs = kills.verbs(made)  # once: the proofs only read the inputs of the verbs
kills.verbs = lambda folder: (shutil.copytree(made, folder, dirs_exist_ok=True), verbs)[1]

codes = [
    kills.main(["--events", "1", "--times", "1"]),
    corruptions.main(["--count", "45"]),
    hostile.main(["--most", "15"]),
]
revq.data.atomic._remove_leftovers = lambda target: None
codes.append(kills.main(["--verbs", "tokenize", "--events", "3", "--times", "0"]))
revq.data.tensor_file.TensorFile._verify_blocks = lambda *arguments: None
codes.append(corruptions.main(["--count", "34"]))
print(codes)
"""


def test_short_runs_and_planted_faults(tmp_path):
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], cwd=root, capture_output=True, text=True, timeout=500, check=False
    )
    output = done.stdout + done.stderr
    assert "8 kills, 0 failures" in output and "45 corruptions, 0 silent or with a traceback" in output, output
    assert "15 cases, 0 wrong" in output, output
    assert "files differ" in output and "silent'" in output, f"planted faults:\n{output}"
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 1, 1]", output


def test_every_change_changes_something():
    rng, data = random.Random(0), bytes(range(48, 148)) * 3
    for change in corruptions.CHANGES:
        assert any(change(data, rng) != data for _ in range(20)), change
