"""The `revq` process: configures the C allocator for large buffers, then runs the command line."""

import ctypes
import os
import sys
from collections.abc import Sequence

from revq.cli import main as run_command_line

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # constants of glibc's malloc.h
_LARGEST_KEPT, _LARGEST_KEPT_BY_OLD_GLIBC = 1 << 27, 1 << 25  # bytes; older glibc rejects more than 32 MB


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers of up to 128 MB for reuse instead of returning them to the system.

    Each batch allocates and frees convolution outputs of several megabytes.  By default glibc maps and unmaps each of
    them, and the page faults on fresh zeroed pages take a large share of the time of encoding on a CPU
    (docs/benchmarks.md, "The demo").  The process holds a little more memory in between.  Nothing changes if the user
    has set malloc's own environment variables.

    Returns:
        Whether the setting is in effect; False if the C library is not glibc.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not tuned else None
    if mallopt is None:
        return False
    keeps = mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BY_OLD_GLIBC)
    return bool(keeps and mallopt(_TRIM_THRESHOLD, -1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `revq` command; returns its exit code."""
    keep_freed_memory()
    return run_command_line(argv)


if __name__ == "__main__":
    sys.exit(main())
