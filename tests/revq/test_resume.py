"""A run that is killed repeatedly (SIGKILL) ends as an uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipeline_case import random_store

from revq.train.state import load_checkpoint
from revq.train.track import read_records

HERE = Path(__file__).resolve().parent
# The run has 4 epochs of 6 steps and writes a checkpoint after steps 4 (6) 8 (12) 16 (18) 20 (24), epoch ends in brackets.
# A step calls the model once, the end of an epoch once more; each process counts from 1.
MOMENTS = [
    ("step", 3, None),  # before any checkpoint
    ("half a checkpoint", 1, None),
    ("step", 6, 4),  # in the middle of an epoch, two steps after a checkpoint inside it
    ("half a line of the log", 2, 4),
    ("before the replacement", 2, 6),
    ("sync of a checkpoint", 3, 6),
    ("after the replacement", 2, 12),
    ("step", 2, 12),
    ("before the model is saved", 1, 24),
]


def start(store, out, moment, number):
    root = str(HERE.parents[1])
    path = os.pathsep.join(filter(None, [root, str(HERE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE / "resume_child.py"), str(store), str(out), moment, str(number)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def run(store, out, moment, number):
    process = start(store, out, moment, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def outcome(out):
    """All files of a run, without wall-clock times."""
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    log = [
        {name: value for name, value in record.items() if name != "seconds"}
        for record in read_records(out / "metrics.jsonl")
    ]
    return {path.name: path.read_bytes() for path in (out / "model").iterdir()}, checkpoint, log


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    random_store(folder / "store")
    assert run(folder / "store", folder / "whole", "never", 0) == 0
    records = read_records(folder / "whole" / "metrics.jsonl")
    assert sum(record.get("moved_codes", 0) for record in records) > 0  # so the test covers the reset
    return folder / "store", outcome(folder / "whole")


def test_killed_nine_times(whole, tmp_path):
    store, expected = whole
    out = tmp_path / "run"
    for moment, number, reached in MOMENTS:
        assert run(store, out, moment, number) == -signal.SIGKILL, f"{moment} never came"
        checkpoint = out / "checkpoint.pt"
        assert (load_checkpoint(checkpoint)["step"] if checkpoint.exists() else None) == reached, moment
        assert not (out / "model").exists()
    assert run(store, out, "never", 0) == 0
    assert_same(outcome(out), expected)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "metrics.jsonl", "model"]


def test_killed_from_outside(whole, tmp_path):
    """The parent kills the child after a number of log lines, at an arbitrary point of the code."""
    store, expected = whole
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    for lines in (5, 17):
        process = start(store, out, "never", 0)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        process.kill()
        process.communicate()
    assert run(store, out, "never", 0) == 0
    assert_same(outcome(out), expected)
