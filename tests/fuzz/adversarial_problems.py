"""Random problems that break nearest-code searches: ties, duplicates, offsets, near ties, denormals, mixed scales, ..."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIMS = (1, 2, 3, 4, 4, 4, 5, 7, 8, 8, 8, 12, 16, 16, 17, 31, 32, 33, 64, 65, 128, 200, 256, 512)
CODES = (1, 2, 7, 16, 17, 100, 255, 256, 1000, 1024, 4095, 4096, 5000, 16384, 16385, 20000, 65536, 70001, 262144)
QUERIES = (1, 2, 5, 33, 64, 100, 200, 256, 700, 1024, 2048, 4097)
GROUPS = (1, 1, 1, 2, 3, 8)
MOST_QUERIES = 65536
HALVES = (torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """One search, with the seed that reproduces it: x ``[N, G, d]``, codebook ``[G, K, d]``."""

    seed: int
    kind: str
    x: Tensor
    codebook: Tensor

    @property
    def pairs(self) -> int:
        """Query-code pairs."""
        return self.x.shape[0] * self.codebook.shape[0] * self.codebook.shape[1]

    @property
    def finite(self) -> bool:
        """No NaN and no infinity."""
        return bool(self.x.isfinite().all()) and bool(self.codebook.isfinite().all())

    def __str__(self) -> str:
        (groups, codes, dim), types = self.codebook.shape, f"{self.x.dtype}, {self.codebook.dtype}"
        return f"seed {self.seed}, {self.kind}: N={len(self.x)} G={groups} K={codes} d={dim}, {types}"


Pair = tuple[Tensor, Tensor]


def _duplicates(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    return x, c[:, torch.randint(0, max(1, c.shape[1] // r.choice((2, 5, 50))), c.shape[1:2])]


def _lattice(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    step = r.choice((0.5, 1, 2, 4))
    return (x * step).round(), (c * step).round()


def _near_ties(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    """All codes have the same distance from the first query, up to rounding; the other queries are close to it."""
    unit = torch.nn.functional.normalize(c, dim=-1) * 2.0 ** r.randint(-8, 8)
    return x[:1] + (x - x[:1]) * r.choice((0, 1e-7, 1e-4)), x[0][:, None] + unit


def _close_to_codes(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    """Queries differ from a code in their last bits, and codes come in close pairs."""
    c = c * 2.0 ** r.randint(-3, 12)
    c[:, 1::2] = c[:, : c.shape[1] // 2 * 2 : 2] * (1 + 2.0 ** -r.randint(20, 24))
    near = c[:, torch.randint(0, c.shape[1], x.shape[:1])].transpose(0, 1)
    return near * (1 + 2.0**-22 * x.sign()), c


def _offset(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    offset = 10.0 ** r.randint(1, 6) * torch.randn(c.shape[0], 1, c.shape[2]).sign()
    return x + offset.transpose(0, 1), c + offset


def _outlier(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    """Some codes are so far away that the mean of all codes is near none of them."""
    c[:, :: max(2, c.shape[1] // r.choice((1, 3, 10)))] *= 10.0 ** r.randint(2, 15)
    return x, c


def _mixed(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    most = r.choice((4, 15, 30, 60))
    scales = [2.0 ** torch.randint(-most, most + 1, s) for s in ((len(x), 1, 1), (*c.shape[:2], 1))]
    return x * scales[0], c * scales[1]


def _powers(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    most = r.choice((1, 3, 12))
    return tuple(v.sign() * 2.0 ** torch.randint(-most, most + 1, v.shape) for v in (x, c))


def _scaled(scale: float) -> Callable[[Tensor, Tensor, random.Random], Pair]:
    return lambda x, c, r: (x * scale, c * scale)


def _clustered(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    centers = 4 * torch.randn(1 + r.randrange(64), c.shape[0], c.shape[2])
    near, at = (torch.randint(0, len(centers), (n,)) for n in (len(x), c.shape[1]))
    spread = 10.0 ** -r.randint(0, 4)
    return x * spread + centers[near], c * spread + centers[at].transpose(0, 1)


def _correlated(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    decay = r.choice((0.3, 0.6, 0.9)) ** torch.arange(c.shape[2])
    return x * decay, c * decay


def _not_finite(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    value = r.choice((float("nan"), float("inf"), -float("inf")))
    for v in (x, c)[r.randrange(2) :]:
        v.view(-1)[torch.randint(0, v.numel(), (1 + v.numel() // r.choice((50, 5000)),))] = value
    return x, c


def _equal(x: Tensor, c: Tensor, r: random.Random) -> Pair:
    return x, c[:, :1].expand_as(c).clone()


KINDS: dict[str, Callable[[Tensor, Tensor, random.Random], Pair]] = {
    "gaussian": lambda x, c, r: (x, c),
    "clustered": _clustered,
    "correlated": _correlated,
    "duplicates": _duplicates,
    "lattice": _lattice,
    "near ties": _near_ties,
    "close to codes": _close_to_codes,
    "offset": _offset,
    "outlier": _outlier,
    "mixed magnitudes": _mixed,
    "powers of two": _powers,
    "denormal distances": _scaled(1e-21),
    "denormal values": _scaled(1e-39),
    "overflow": _scaled(2e19),
    "not finite": _not_finite,
    "all equal": _equal,
}


def problem(seed: int, most_pairs: int, most_work: int) -> Problem:
    """The problem of a seed, with at most ``most_pairs`` pairs and pairs times d below ``most_work``."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    dim, codes, groups, queries = (r.choice(sizes) for sizes in (DIMS, CODES, GROUPS, QUERIES))
    most = min(most_pairs, most_work // dim)
    codes = min(codes, most)
    groups = max(1, min(groups, most // codes))
    queries = most // (codes * groups) if r.random() < 0.5 else min(queries, most // (codes * groups))
    queries = max(1, min(queries, MOST_QUERIES))
    kind = r.choice(list(KINDS))
    x, codebook = KINDS[kind](torch.randn(queries, groups, dim), torch.randn(groups, codes, dim), r)
    if r.random() < 0.15:
        x = x.to(r.choice(HALVES))
    if r.random() < 0.15:
        codebook = codebook.to(r.choice(HALVES))
    if r.random() < 0.2:  # the same values with other strides
        x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        codebook = codebook.transpose(1, 2).contiguous().transpose(1, 2)
    return Problem(seed, kind, x, codebook)
