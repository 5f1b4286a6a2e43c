"""Checkpoints and logs: replaced in one step; a damaged one is refused."""

import os

import pytest
import torch

from revq.data.atomic import atomic_file
from revq.errors import InputError
from revq.train.state import load_checkpoint, save_checkpoint
from revq.train.track import Tracker, read_records


def test_round_trip(tmp_path):
    state = {"a": torch.randn(3), "n": 3, "s": "text", "list": [1.5, None], "deep": {"t": torch.arange(4)}}
    save_checkpoint(tmp_path / "sub" / "c.pt", state)
    got = load_checkpoint(tmp_path / "sub" / "c.pt")
    assert torch.equal(got["a"], state["a"]) and torch.equal(got["deep"]["t"], state["deep"]["t"])
    assert (got["n"], got["s"], got["list"]) == (3, "text", [1.5, None])
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["c.pt"]


def test_damaged_or_missing(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"a": torch.randn(1000)})
    whole = path.read_bytes()
    for damaged in (b"", b"garbage", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"c\.pt: damaged"):
            load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="dictionary"):
        load_checkpoint(path)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_code_runs_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Code()}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"n": 1})

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, {"n": 2})
    assert load_checkpoint(path) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_log_is_flushed_and_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Tracker(path) as log:
        for step in range(1, 6):
            log.log(kind="step", step=step, loss=step / 4)
            assert len(read_records(path)) == step
    path.write_text(path.read_text() + '{"step": 6, "loss":')  # an incomplete last line
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]
    with Tracker(path, step=3) as log:
        log.log(kind="step", step=4, loss=9.0)
    assert [(record["step"], record["loss"]) for record in read_records(path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 9.0),
    ]
    with Tracker(path):
        assert read_records(path) == []


def test_log_refuses_other_files(tmp_path):
    assert read_records(tmp_path / "none") == []
    for text in ("hello\n", "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n'):
        (tmp_path / "m").write_text(text)
        with pytest.raises(InputError, match="line 1"):
            read_records(tmp_path / "m")
