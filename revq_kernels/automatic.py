"""`AutomaticIndex`: lets a `CodebookIndex` answer where that is faster, without being asked and without trusting anybody.

A tree costs about as much to build as brute force costs for five thousand queries, pays for itself where it visits few
codes, and loses where it visits many.  So: brute force until a build is cheap beside what was spent, or beside what the
next calls save; then a trial on a few queries; then the tree, for as long as the visits it measures stay low.  Before each
search of the tree all bytes of the codebook are read and compared with what it was built from, by a keyed digest (`holds`):
version counters miss fused optimizers, ``.data`` and native in-place operators.

Every decision follows from counts, none from a clock, and none changes a result.
"""

import math
import threading

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from revq_kernels import native
from revq_kernels.functional import Quantized, look_up, nearest_code, quantize
from revq_kernels.index import CodebookIndex

LEAST_CODES = 4096
"""Below this K brute force is a match for any tree."""
LEAST_ROWS, LEAST_PAIRS = 64, 96 * 4096
"""Below this N, or N * K, comparing the codebook takes longer than the tree saves, and the books are felt."""
MOST_COST = 0.08
"""A tree must cost no more than this share of visiting all leaves: brute force breaks even at 0.09 (d = 12) to 0.2."""
TRIAL_CODES, TRIAL_ROWS = 2048, 32
"""A trial on so few codes is over in 0.3 ms; `_predict` says what it means for all of them."""
HOPELESS_COST = 0.3
"""Where the prediction of a later trial is above this, not even a larger trial is made."""
LEAST_WORK = 1 << 31
"""Numbers (N * G * K * d, d up to 16) that brute force has compared before a trial: a few per cent of the time."""
ROWS_PER_LEVEL, ROWS_EXPONENT = 1200, -0.7
"""Times d to the second: queries per group that brute force answers in the time of one level of a build (measured: d = 4:
450, d = 8: 270, d = 12: 215, d = 16: 155)."""
MOST_LOSS, CALLS, LEAST_SAVING = 0.05, 64, 0.6
"""A build takes no more than this share of the time so far, or pays for itself within so many calls, by saving this share
(0.8 at d = 4, 0.6 at d = 8)."""
BACKOFF = 32
"""After a tree that did not pay, the next is tried after so many times the work."""


class AutomaticIndex:
    """Searches one codebook again and again, by brute force or by a tree, whichever has shown itself the faster.

    Results are those of `nearest_code` and `quantize` with ``impl="auto"``, bit for bit.  A copy or a pickle of it starts
    with nothing.  Calls from a second thread, while one is under way, run brute force.  What is too small for a tree over
    codebooks of the first one's shape runs brute force with any, until `forget`: a short search has no time for questions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forget()

    def nearest_code(self, x: Tensor, codebook: Tensor) -> Tensor:
        """As `revq_kernels.nearest_code`."""
        indices = self._by_index(x, codebook)
        return nearest_code(x, codebook) if indices is None else indices

    def quantize(self, x: Tensor, codebook: Tensor, *, deterministic: bool = True) -> Quantized:
        """As `revq_kernels.quantize` without a count."""
        indices = self._by_index(x, codebook)
        if indices is None:
            return quantize(x, codebook, deterministic=deterministic)
        return Quantized(look_up(codebook, indices, x.dtype), indices)

    def forget(self) -> None:
        """Free the tree and start anew."""
        self.index: CodebookIndex | None = None
        self.reason = "too few queries so far"
        self._shape: torch.Size | None = None
        self._least_numbers: float = 0
        self._rows = self._calls = 0
        self._patience = 1

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (AutomaticIndex, ())

    def __str__(self) -> str:
        return f"{'brute force' if self.index is None else 'tree'}: {self.reason}"

    def _by_index(self, x: Tensor, codebook: Tensor) -> Tensor | None:
        """The indices, or None for the caller to run brute force: small calls learn that in the first lines."""
        if is_compiling() or type(x) is not Tensor:
            return None  # a fake, functional or wrapped tensor has no bytes to compare
        numbers = x.numel()
        if numbers < self._least_numbers or type(codebook) not in (Tensor, nn.Parameter) or torch.jit.is_tracing():
            return None
        shape = codebook.shape
        if (shape != self._shape and not self._meet(shape)) or numbers < self._least_numbers or not codebook.is_cpu:
            return None
        index = self.index
        if (index is None and not self._due(numbers // self._row_numbers)) or not _fits(x, shape):
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self.index is not index or self._shape != shape:
                return None  # another thread came in between
            index = index or self._built(x, codebook)
            return None if index is None else self._search(index, x, codebook)
        finally:
            self._lock.release()

    def _meet(self, shape: torch.Size) -> bool:
        """Start anew with codebooks of this shape, unless it is none or a search of another is under way."""
        if len(shape) != 3 or 0 in shape or not self._lock.acquire(blocking=False):
            return False
        self.forget()
        num_groups, num_codes, code_dim = shape
        self._row_numbers = num_groups * code_dim
        self._row_work = num_groups * num_codes * min(code_dim, 16)  # a trial, too, takes longer with d
        rows_per_level = ROWS_PER_LEVEL * code_dim**ROWS_EXPONENT
        self._build_rows = int(rows_per_level * (num_codes // 16).bit_length())  # in rows of brute force
        self._be_patient(1)
        rows = max(LEAST_ROWS, -(-LEAST_PAIRS // num_codes)) if num_codes >= LEAST_CODES else math.inf
        self._least_numbers = rows * self._row_numbers
        self._shape = shape
        self._lock.release()
        return True

    def _be_patient(self, patience: int) -> None:
        """Count from nothing up to ``patience`` times the work before a trial."""
        self._rows = 0
        self._patience = patience
        self._trial_rows = max(patience * self._build_rows, -(-patience * LEAST_WORK // self._row_work))

    def _due(self, rows: int) -> bool:
        """Count what brute force does; whether it has done enough for a trial."""
        self._calls += 1
        self._rows += rows
        build = self._build_rows
        return self._rows >= self._trial_rows and (
            build <= MOST_LOSS * self._rows or build <= (CALLS - self._calls) * rows * LEAST_SAVING
        )

    def _search(self, index: CodebookIndex, x: Tensor, codebook: Tensor) -> Tensor:
        if not index.holds(codebook):
            index.refit(codebook)
        indices = index.nearest_code(x)
        share = _cost_share(index)
        self.reason = f"visits {index.visited:.1%} of the codes"
        if share > MOST_COST:
            # where the codes have left their splits behind, a new tree may do better, in its time
            self._give_up(f"the tree cost {share:.0%} of all leaves", self._patience * (BACKOFF if index.fits else 1))
        return indices

    def _built(self, x: Tensor, codebook: Tensor) -> CodebookIndex | None:
        """A tree, if a trial shows that it pays."""
        later, first_try = self._patience * BACKOFF, self._patience == 1
        stride = max(1, codebook.shape[1] // TRIAL_CODES)
        predicted = _predict(_trial(x, codebook, stride=stride), stride)
        if predicted > (MOST_COST if first_try else HOPELESS_COST):
            self._give_up(f"a tree would cost {predicted:.0%} of its leaves, by a trial", later)
        elif not first_try and (all_codes := _trial(x, codebook, stride=1)) > MOST_COST:
            self._give_up(f"a tree of one group cost {all_codes:.0%} of its leaves", later)
        else:
            self.index = CodebookIndex(codebook)
        return self.index

    def _give_up(self, reason: str, patience: int) -> None:
        """Back to brute force, for longer than the last time."""
        self.index, self.reason = None, reason
        self._be_patient(min(patience, BACKOFF**6))


def _predict(share: float, stride: int) -> float:
    """Cost share of a tree over stride times as many codes as one that cost ``share``; fits Gaussian d = 4 ... 16."""
    return share * stride ** -max(0.0, 0.75 - 0.5 * share)


def _trial(x: Tensor, codebook: Tensor, *, stride: int) -> float:
    """Cost share of a tree over every stride-th code of the first group, on the first queries."""
    trial = CodebookIndex(codebook[:1, ::stride])
    trial.nearest_code(x.reshape(-1, *x.shape[-2:])[:TRIAL_ROWS, :1])
    return _cost_share(trial)


def _cost_share(index: CodebookIndex) -> float:
    """What the last search cost, as a share of visiting all leaves."""
    last = index.last
    return (last.cost + last.scanned * index.leaves) / max(1, last.queries * index.leaves)


def _fits(x: Tensor, shape: torch.Size) -> bool:
    """Whether a tree over codes of ``shape`` can take ``x``."""
    return x.is_cpu and x.dim() >= 2 and x.shape[-2:] == (shape[0], shape[2]) and native.load() is None
