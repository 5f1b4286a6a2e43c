"""Which implementations this machine can run, and how many tests each got."""

from collections import Counter

import pytest
import torch

from revq_kernels import native, triton

# Triton's interpreter is chosen when Triton is imported: `make test` gives these tests a process of their own
IMPLEMENTATIONS = ("triton",) if triton.interpreted() else ("reference", "native")
_ran: Counter = Counter()


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    """Each implementation by name; one that cannot run here is skipped with its reason."""
    if request.param == "native" and native.load() is not None:
        pytest.skip(f"native: {native.load()}")
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For small problems: several threads would wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        names = [name for name in IMPLEMENTATIONS if name in report.nodeid.partition("[")[2]]
        _ran[names[0] if names else "no implementation in its name"] += 1


def pytest_terminal_summary(terminalreporter):
    failure = native.load()
    terminalreporter.write_line(
        "tests passed per implementation: "
        + ", ".join(f"{name} {_ran[name]}" for name in (*IMPLEMENTATIONS,))
        + f"; independent of one {_ran['no implementation in its name']}; "
        + (f"native is {native.isa()}, {torch.get_num_threads()} threads" if failure is None else f"native: {failure}")
    )
