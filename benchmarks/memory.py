"""Peak memory of a call against K: each provider in a process of its own, after a small call that loads its libraries.

python -m benchmarks.memory [--providers NAME ...]
"""

import argparse

import torch

from benchmarks.harness.cases import MEMORY
from benchmarks.harness.memory import peak
from benchmarks.harness.rows import RESULTS, Rows, provenance
from benchmarks.providers import serving


def main(arguments: list[str] | None = None) -> None:
    """Measure the memory cases and write the rows (Linux)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--providers", nargs="*", metavar="NAME", help="these and revq; all if not given")
    providers = [p for p in serving("cpu", parser.parse_args(arguments).providers) if not p.missing]
    rows = Rows("memory-cpu", RESULTS, provenance("python -m benchmarks.memory"))
    for case in MEMORY:
        for provider in providers:
            megabytes = peak(case, provider.name, torch.get_num_threads())
            note = megabytes if isinstance(megabytes, str) else ""
            rows.add(
                [
                    {
                        **case._asdict(),
                        "provider": provider.name,
                        "peak_above_inputs_mb": "" if note else megabytes,
                        "note": note,
                    }
                ]
            )
            print(f"{case.name:12} {provider.name:26} {megabytes:>8} MB above its inputs", flush=True)


if __name__ == "__main__":
    main()
