"""Problem sizes and random data, shared by every benchmark."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOBS = 64
CORRELATION = 0.7
DUPLICATE_SHARE = 0.4


class Case(NamedTuple):
    """One search: N queries in each of G groups, against K codes of dimension d.

    ``kind`` says how queries and codes are drawn:

    * "gaussian": standard normal;
    * "clustered": 64 blobs per group; a blob's standard deviation is 1/8 of the deviation of the blobs' centers;
    * "correlated": neighboring elements of a vector correlate by 0.7;
    * "duplicates": as gaussian, but 40 % of the codes have an exact duplicate under another index;
    * "real": latents of photos, normalized.

    ``offset`` is added to every element of queries and codes.
    """

    name: str
    N: int
    G: int
    K: int
    d: int
    offset: float = 0.0
    kind: str = "gaussian"

    @property
    def pairs(self) -> int:
        """Query-code pairs of one search."""
        return self.N * self.G * self.K

    @property
    def bytes(self) -> int:
        """The fewest bytes a search moves: queries and codes read once as float32, int64 indices written once."""
        return 4 * self.d * self.G * (self.N + self.K) + 8 * self.N * self.G

    def tensors(self, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """x ``[N, G, d]`` and codebook ``[G, K, d]``, drawn on the device: the same for one seed and device type."""
        generator = torch.Generator(device).manual_seed(seed)
        x, codebook = KINDS[self.kind](self, generator)
        return x.transpose(0, 1).contiguous().add_(self.offset), codebook.add_(self.offset)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _gaussian(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(generator, case.G, case.N, case.d), _normal(generator, case.G, case.K, case.d)


def _clustered(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centers = 2 * _normal(generator, case.G, BLOBS, case.d)
    group = torch.arange(case.G, device=generator.device)[:, None]

    def around(count: int) -> Tensor:
        noise = _normal(generator, case.G, count, case.d).mul_(0.25)
        return noise.add_(centers[group, _integers(generator, BLOBS, case.G, count)])

    return around(case.N), around(case.K)


def _correlated(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pair = _gaussian(case, generator)
    for values in pair:
        for j in range(1, case.d):  # AR(1) with unit variance, in place
            values[..., j].mul_((1 - CORRELATION**2) ** 0.5).add_(values[..., j - 1], alpha=CORRELATION)
    return pair


def _duplicates(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, codebook = _gaussian(case, generator)
    order = torch.randperm(case.K, generator=generator, device=generator.device)
    copies = int(case.K * DUPLICATE_SHARE / 2)
    codebook[:, order[:copies]] = codebook[:, order[copies : 2 * copies]]
    return x, codebook


def _real(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    from benchmarks.harness import latents  # the first use encodes photos

    return latents.problem(case.N, case.G, case.K, case.d, generator)


KINDS = {
    "gaussian": _gaussian,
    "clustered": _clustered,
    "correlated": _correlated,
    "duplicates": _duplicates,
    "real": _real,
}

PAPER = [
    Case("512T", 256, 512, 16384, 4),
    Case("256T", 256, 256, 65536, 8),
    Case("256T-L", 128, 256, 262144, 8),
]

PAPER_DATA = [
    *(case._replace(name=f"{case.name}, duplicates", kind="duplicates") for case in PAPER),
    PAPER[0]._replace(name="512T, offset 10", offset=10.0),
    PAPER[0]._replace(name="512T, offset 100", offset=100.0),
    PAPER[0]._replace(name="512T, correlated", kind="correlated"),
    PAPER[0]._replace(name="512T, clustered", kind="clustered"),
]

SINGLE = [
    Case("single d4", 2**20, 1, 16384, 4),
    Case("single d8", 2**20, 1, 16384, 8),
    Case("single d8, few queries", 256, 1, 262144, 8),
    Case("single d16", 65536, 1, 16384, 16),
    Case("single d64", 65536, 1, 16384, 64),
    Case("single d256", 65536, 1, 8192, 256),
    Case("single d8, large", 2**20, 1, 262144, 8),
]

# The paper's configurations with fewer groups, for a CPU (the paper: G = 512, 256, 256).
CPU_PAPER = [
    Case("512T", 256, 8, 16384, 4),
    Case("256T", 256, 2, 65536, 8),
    Case("256T-L", 128, 1, 262144, 8),
]

CPU_REAL = [
    Case("512T, real", 256, 8, 16384, 4, kind="real"),
    Case("256T, real", 256, 2, 65536, 8, kind="real"),
]

# The cases that have goals (benchmarks/harness/report.py).
ACCEPTANCE = [
    *CPU_PAPER,
    Case("d16", 2048, 1, 16384, 16),
    Case("d32", 4096, 1, 8192, 32),
    Case("d64", 2048, 1, 16384, 64),
    Case("d256", 2048, 1, 8192, 256),
    Case("d256, few codes", 4096, 1, 1024, 256),
    *CPU_REAL,
]

TOKENIZER_QUERIES = 1024
TOKENIZER_WORK = 1 << 33
"""Upper bound of N * K * d in a tokenizer case: cases with many or long codes get fewer queries."""


def tokenizers(dims: tuple[int, ...] = (4, 8, 16, 32, 64, 256)) -> list[Case]:
    """A grid of single codebooks: K = 1,024 ... 262,144 for every d, and N = 256 ... 65,536 for K = 16,384, d = 8."""
    grid = [
        Case(f"d{d} K{K}", max(256, min(TOKENIZER_QUERIES, TOKENIZER_WORK // (K * d))), 1, K, d)
        for K in (16384, 1024, 65536, 4096, 262144)
        for d in dims
    ]
    return grid + [Case(f"d8 K16384 N{N}", N, 1, 16384, 8) for N in (256, 8192, 65536)]


def _suite() -> list[Case]:
    def changed(label: str, **change: Any) -> list[Case]:
        return [case._replace(name=f"{case.name}, {label}", **change) for case in CPU_PAPER]

    ties = changed("duplicates", kind="duplicates")
    offsets = changed("offset 10", offset=10.0) + changed("offset 100", offset=100.0)
    kinds = changed("clustered", kind="clustered") + changed("correlated", kind="correlated")
    return [*CPU_PAPER, *CPU_REAL, *ties, *offsets, *tokenizers(), *kinds]


SEARCH = _suite()

MEMORY = [Case(f"d8 K{K}", 4096, 1, K, 8) for K in (1024, 4096, 16384, 65536, 262144)]

# Small versions of the GPU cases, for a dry run.
SMALL = [
    Case("512T, small", 16, 4, 256, 4),
    Case("256T-L, duplicates, small", 8, 2, 1024, 8, kind="duplicates"),
    Case("512T, offset 100, small", 16, 2, 256, 4, offset=100.0),
    Case("single d16, small", 256, 1, 128, 16, kind="correlated"),
]
