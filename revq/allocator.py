"""The C allocator of a process that works in large buffers."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT, _LARGEST_OF_OLD_GLIBC = 1 << 27, 1 << 25  # bytes


def keep_freed_memory() -> bool:
    """Tell glibc to keep buffers of up to 128 MB that are freed, for the next ones, and not to return them.

    A convolution's output of some megabytes is allocated and freed with every batch.  By default each comes from the
    system again as pages of zeros, 4 KB at a time, which takes two fifths of the time of encoding images on two cores
    (docs/benchmarks.md, "The demo").  The process grows a little by what lies unused in between.  Whoever sets malloc's own
    environment variables is left alone.

    Returns:
        Whether the allocator does so; False where it is not glibc's.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not tuned else None
    if mallopt is None:
        return False
    keeps = mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    return bool(keeps and mallopt(_TRIM_THRESHOLD, -1))
