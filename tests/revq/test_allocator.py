"""glibc keeps freed memory after `keep_freed_memory`: page faults are counted, each case in its own process."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from revq.__main__ import keep_freed_memory, main

def faults():
    for _ in range(20):  # the first buffers still grow the heap
        torch.ones(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = {call}
warm = faults()
print(kept, (faults() - warm) / 20)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting exists in glibc only")


def faults(call: str, **environment: str) -> tuple[str, float]:
    """What a call returned, and page faults per buffer of 64 MB after it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", FAULTS.replace("{call}", call)],
        env=clean | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    kept, count = process.stdout.split()[-2:]
    return kept, float(count)


@glibc
def test_freed_buffers_are_reused():
    pages = (1 << 26) / os.sysconf("SC_PAGE_SIZE")
    assert faults("None")[1] > pages / 2  # without the setting there are page faults
    kept, count = faults("keep_freed_memory()")
    assert kept == "True"
    assert count < pages / 100


@glibc
def test_the_revq_process_keeps_freed_memory(tmp_path):
    kept, count = faults(f"main(['info', {str(tmp_path / 'missing')!r}])")
    assert kept == "2"
    assert count < 200


@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "3"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}])
def test_a_users_own_settings_stay(setting):
    assert faults("keep_freed_memory()", **setting)[0] == "False"
