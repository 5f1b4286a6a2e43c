"""Time of the search beside its peers: interleaved rounds, medians; refused when one of our indices is wrong."""

import statistics
import time

import torch

from benchmarks.cases import SEARCH, Case
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.rows import provenance, write
from revq_kernels import explain, nearest_code

ROUNDS = 7


def farther_share(case: Case, indices: torch.Tensor, rows: int = 256) -> float:
    """Share of the first rows whose code is farther than the float64 minimum by more than one part in a million."""
    x, codebook = (tensor.double() for tensor in case.tensors())
    farther = []
    for g in range(case.G):
        distance = torch.cdist(x[:rows, g], codebook[g], compute_mode="donot_use_mm_for_euclid_dist").square()
        chosen = distance.gather(1, indices[:rows, g, None]).squeeze(1)
        farther.append(chosen > distance.amin(1) * (1 + 1e-6))
    return torch.stack(farther).float().mean().item()


def measure(case: Case) -> list[dict]:
    """One row per provider; every round times all of them in turn."""
    x, codebook = case.tensors()
    found = {name: provider(x, codebook) for name, provider in PROVIDERS.items()}  # also the warm-up
    rows = min(case.N, max(1, 2**22 // case.K))
    truth = nearest_code(x[:rows], codebook, impl="reference")
    for name in OURS:
        if not torch.equal(found[name][:rows], truth):
            raise SystemExit(f"{case.name}: {name} returns a wrong index; nothing is measured on a red gate")
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(ROUNDS):
        for name, provider in PROVIDERS.items():
            start = time.perf_counter()
            provider(x, codebook)
            times[name].append(time.perf_counter() - start)
    pairs = case.N * case.G * case.K
    return [
        {
            **case._asdict(),
            "provider": name,
            "rounds": ROUNDS,
            "median_ms": round(statistics.median(seconds) * 1e3, 3),
            "min_ms": round(min(seconds) * 1e3, 3),
            "max_ms": round(max(seconds) * 1e3, 3),
            "gpairs_per_s": round(pairs / statistics.median(seconds) / 1e9, 3),
            "times_revq": round(statistics.median(a / b for a, b in zip(seconds, times["revq"], strict=True)), 2),
            "farther_share": round(farther_share(case, found[name]), 6),
            "kernel": str(explain(x, codebook)) if name in OURS else "",
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    """Measure every case and write the rows."""
    source = provenance()
    rows = []
    for case in SEARCH:
        for row in measure(case):
            rows.append({**row, **source})
            print(f"{case.name:16} {row['provider']:16} {row['median_ms']:10.2f} ms  {row['times_revq']:6.2f}x of revq")
    print(write("search-cpu", rows))


if __name__ == "__main__":
    main()
