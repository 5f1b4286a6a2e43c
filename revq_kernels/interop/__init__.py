"""Fused search for the quantizers of other libraries; separate, so that ``import revq_kernels`` loads none of it."""

from revq_kernels.interop.lazy_cdist import fast_distances
from revq_kernels.interop.patching import Entry, Patched, like, patch, unpatch

__all__ = ["Entry", "Patched", "fast_distances", "like", "patch", "unpatch"]
