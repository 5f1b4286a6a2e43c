"""`AutomaticIndex`: lets a `CodebookIndex` answer where that is faster, without being asked and without trusting anybody.

A tree costs about as much to build as brute force costs for a thousand queries, pays for itself where it visits few
codes, and loses where it visits many.  So: brute force until it has spent what a build costs; then a trial on a few
queries; then the tree, for as long as the visits it measures stay low.  At each call all bytes of the codebook are compared
with the tree's own copy: version counters miss fused optimisers, ``.data`` and native in-place operators.

Every decision follows from counts, none from a clock, and none changes a result.
"""

import threading

import torch
from torch import Tensor, nn

from revq_kernels import native
from revq_kernels.autograd import CodebookGradient
from revq_kernels.functional import Quantized, nearest_code, quantize
from revq_kernels.index import CodebookIndex
from revq_kernels.reference import gather_codes

LEAST_CODES = 4096
"""Below this K brute force is a match for any tree."""
LEAST_ROWS = 64
"""Below this N, comparing the codebook takes longer than the tree saves."""
MOST_COST = 0.1
"""A tree must cost no more than this share of visiting all leaves: brute force shares its work among queries."""
TRIAL_CODES, TRIAL_ROWS = 2048, 32
"""A trial on so few codes is over in 0.3 ms, and visits a larger share of them than of the whole codebook."""
CLEAR_COST, HOPELESS_COST = 0.4, 0.75
"""So below the first share the whole tree pays, above the second it does not; in between a larger trial tells, later."""
LEAST_WORK = 1 << 28
"""Numbers (N * G * K * d) that brute force has compared before a trial: it then is a few per cent of the time."""
ROWS_PER_LEVEL = 128
"""Queries per group that brute force answers in the time of one level of a build."""
BACKOFF = 8
"""After a tree that did not pay, the next is tried after so many times the work."""


class AutomaticIndex:
    """Searches one codebook again and again, by brute force or by a tree, whichever has shown itself the faster.

    Results are those of `nearest_code` and `quantize` with ``impl="auto"``, bit for bit.  A copy or a pickle of it starts
    with nothing.  Calls from a second thread, while one is under way, run brute force.
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
        quantized = gather_codes(codebook.detach(), indices, x.dtype)
        if codebook.requires_grad and torch.is_grad_enabled():
            quantized = CodebookGradient.apply(codebook, quantized, indices, "default")
        return Quantized(quantized, indices)

    def forget(self) -> None:
        """Free the tree and start anew."""
        self.index: CodebookIndex | None = None
        self.reason = "too few queries so far"
        self._rows = self._work = 0
        self._patience = 1

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (AutomaticIndex, ())

    def __str__(self) -> str:
        return f"{'brute force' if self.index is None else 'tree'}: {self.reason}"

    def _by_index(self, x: Tensor, codebook: Tensor) -> Tensor | None:
        """The indices, or None for the caller to run brute force."""
        if not _eligible(x, codebook) or not self._lock.acquire(blocking=False):
            return None
        try:
            if self.index is not None and self.index.shape != tuple(codebook.shape):
                self.forget()
            rows = x.shape[:-2].numel()
            if rows < LEAST_ROWS and self.index is not None:
                return None
            if self.index is None and not self._pays(x, codebook, rows):
                return None
            return self._search(x, codebook)
        finally:
            self._lock.release()

    def _search(self, x: Tensor, codebook: Tensor) -> Tensor:
        index = self.index
        assert index is not None
        if not index.holds(codebook):
            index.refit(codebook)
        indices = index.nearest_code(x)
        share = _cost_share(index)
        self.reason = f"visits {index.visited:.1%} of the codes"
        if share > MOST_COST:
            patience = self._patience
            self._give_up(f"the tree cost {share:.0%} of all leaves")
            if not index.fits:  # the codes have left their splits behind: a new tree may do better, in its time
                self._patience = patience
        return indices

    def _pays(self, x: Tensor, codebook: Tensor, rows: int) -> bool:
        """Count what brute force does, and build a tree once it has done enough and a trial shows that it pays."""
        num_groups, num_codes, code_dim = codebook.shape
        self._rows += rows
        self._work += rows * num_groups * num_codes * code_dim
        levels = (num_codes // 16).bit_length()
        wanted = self._patience * ROWS_PER_LEVEL * levels
        if self._rows < wanted or self._work < self._patience * LEAST_WORK or rows < LEAST_ROWS:
            return False
        first_try = self._patience == 1
        few = _trial(x, codebook, stride=max(1, num_codes // TRIAL_CODES))
        if few > (CLEAR_COST if first_try else HOPELESS_COST):
            return self._give_up(f"a tree of {TRIAL_CODES} codes cost {few:.0%} of its leaves")
        if not first_try and (all_codes := _trial(x, codebook, stride=1)) > MOST_COST:
            return self._give_up(f"a tree of one group cost {all_codes:.0%} of its leaves")
        self.index = CodebookIndex(codebook)
        return True

    def _give_up(self, reason: str) -> bool:
        """Back to brute force, for longer than the last time; returns False."""
        self.index, self.reason = None, reason
        self._rows = self._work = 0
        self._patience = min(self._patience * BACKOFF, BACKOFF**6)
        return False


def _trial(x: Tensor, codebook: Tensor, *, stride: int) -> float:
    """Cost share of a tree over every stride-th code of the first group, on the first queries."""
    trial = CodebookIndex(codebook[:1, ::stride])
    trial.nearest_code(x.reshape(-1, *x.shape[-2:])[:TRIAL_ROWS, :1])
    return _cost_share(trial)


def _cost_share(index: CodebookIndex) -> float:
    """What the last search cost, as a share of visiting all leaves."""
    last = index.last
    return (last.cost + last.scanned * index.leaves) / max(1, last.queries * index.leaves)


def _eligible(x: Tensor, codebook: Tensor) -> bool:
    """Whether a tree may answer: plain CPU tensors of the right shapes, outside compilers and tracers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(x) is not Tensor or type(codebook) not in (Tensor, nn.Parameter):
        return False  # a fake, functional or wrapped tensor has no bytes to compare
    if x.device.type != "cpu" or codebook.device.type != "cpu" or codebook.dim() != 3 or x.dim() < 2:
        return False
    if x.shape[-2:] != (codebook.shape[0], codebook.shape[2]) or codebook.shape[1] < LEAST_CODES:
        return False
    return native.load() is None
