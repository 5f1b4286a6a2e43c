"""Peak memory of one call above its inputs, output included: each provider in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.cases import MEMORY
from benchmarks.rows import provenance, write

CHILD = """
import json, sys, torch
from pathlib import Path
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

name, case = sys.argv[1], Case(*json.loads(sys.argv[2]))
x, codebook = case.tensors()
PROVIDERS[name].search(x[:64], codebook[:, :64])  # loads libraries and starts threads
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
indices = PROVIDERS[name].search(x, codebook)
peak = status("VmHWM")
print(json.dumps({"extra": peak - before}))
"""


def main() -> None:
    """Measure every provider on the memory case and write the rows (Linux)."""
    source, rows = provenance(), []
    for case in MEMORY:
        for name in ("revq", "torch.cdist", "addmm, chunked"):
            command = [sys.executable, "-c", CHILD, name, json.dumps(case)]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            measured = json.loads(result.stdout)
            above = measured["extra"] / 1e6
            rows.append({**case._asdict(), "provider": name, "peak_above_inputs_mb": round(above, 1), **source})
            print(f"{case.name} {name:16} {above:8.1f} MB above its inputs")
    print(write("memory-cpu", rows))


if __name__ == "__main__":
    main()
