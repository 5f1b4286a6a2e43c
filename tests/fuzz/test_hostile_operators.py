"""Direct calls of the operators with hostile tensors: an error, or indices that are codes, and the process lives.

Apart from the calls themselves, `hostile_operators.py`, which a test runs in a process that may crash.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revq_kernels import native

SCRIPT = Path(__file__).with_name("hostile_operators.py")
OPS = torch.ops.revq

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}")


def test_no_call_ends_the_process():
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, SCRIPT, "3", "400"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert "index_search returned" in done.stdout and "index_search raised" in done.stdout


def test_a_damaged_tree_gives_codes_or_an_error():
    x, codebook = torch.randn(50, 2, 4), torch.randn(2, 5000, 4)
    panels, ids, boxes, finite = OPS.index_build(codebook)
    nan, far = float("nan"), ids + 5000
    for damaged in ((panels, ids, boxes * nan, finite), (panels, ids, boxes * -1, finite)):
        found, _ = OPS.index_search(x, *damaged, 5000)
        assert int(found.min()) >= 0 and int(found.max()) < 5000
    for damaged in (
        (panels * nan, ids, boxes, finite),
        (panels, far, boxes, finite),
        (panels, -far, boxes, finite * 0),
    ):
        with pytest.raises(RuntimeError, match=r"panels, ids, boxes, finite: expected .* found no code in \[0, K\)"):
            OPS.index_search(x, *damaged, 5000)


def test_a_refit_does_not_overwrite_the_ids_that_it_reads():
    codebook = torch.randn(2, 40, 4)
    panels, ids, boxes, finite = OPS.index_build(codebook)
    within = panels.view(torch.int32).view(-1)[: ids.numel()].view(ids.shape).copy_(ids)
    with pytest.raises(RuntimeError, match="ids: expected memory apart from panels, boxes and finite"):
        OPS.index_refit_(panels, within, boxes, finite, codebook)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_a_tensor_on_another_device_is_refused(overload):
    x, codebook, indices = torch.randn(5, 2, 4), torch.randn(2, 7, 4), torch.zeros(5, 2, dtype=torch.int64)
    count = torch.zeros(2, 7, dtype=torch.int64)
    for name, arguments in (
        ("nearest_code", (x, codebook.to("meta"))),
        ("quantize", (x.to("meta"), codebook, None)),
        ("quantize", (x, codebook, count.to("meta"))),
        ("nearest_by_metric", (x, codebook, x.to("meta"), "diagonal")),
        ("segment_sum", (x, indices.to("meta"), 7)),
        ("count_codes_", (count, indices.to("meta"))),
    ):
        with pytest.raises(ValueError, match=rf"revq::{name}.*: expected all tensors on one device, got cpu and meta"):
            getattr(getattr(OPS, name), overload)(*arguments)


def test_every_metric_of_the_table_has_an_operator():
    x, codebook = torch.randn(5, 2, 4), torch.randn(2, 7, 4)
    with pytest.raises(ValueError, match=r"metric: expected 'inner_product' or 'diagonal', .* got 'l2'"):
        OPS.nearest_by_metric(x, codebook, None, "l2")
    for call in (OPS.nearest_code, OPS.nearest_code.reference):
        with pytest.raises((ValueError, RuntimeError), match="codebook: expected"):
            call(torch.zeros(1).expand(1, 1, 2**31), torch.zeros(1).expand(1, 1, 2**31))
