"""Checkpoints, logs and the weights of models: replaced in one step; a damaged one is refused, down to a single bit."""

import copy
import math
import os
import random
import resource
import signal

import pytest
import torch
from pipeline_case import random_store, tiny_run
from safetensors.torch import load_file, save_file

from revq.data.atomic import atomic_file
from revq.errors import InputError
from revq.model.revq import ReVQ
from revq.train.loop import train
from revq.train.state import RunState, about_run, load_checkpoint, save_checkpoint
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
    deep = b'{"step": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    texts = [b"hello", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": 1.5}', b'{"step": true}', b"\xff\xfe", deep]
    for text in [
        *texts,
        b'{"step": 1e999}',
        b'{"step": 1, "loss": NaN}',
        b'{"step": 1, "loss": -1e999}',
        b'{"step": -1}',
    ]:
        (tmp_path / "m").write_bytes(b'{"step": 1}\n' + text + b"\n")
        with pytest.raises(InputError, match="line 2") as caught:
            read_records(tmp_path / "m")
        assert "\n" not in str(caught.value)


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(tmp_path):
    """Flips in records, the directory and the headers of the archive; bytes cut off or appended."""
    path = tmp_path / "c.pt"
    state = {"a": torch.arange(700.0), "n": 3, "deep": {"t": torch.arange(64)}}
    save_checkpoint(path, state)
    whole, rng, found = path.read_bytes(), random.Random(1), 0
    damaged = [whole[:-1], whole + b"\0", whole + b"PK\5\6" + bytes(18), whole[:-22]]
    for place in [*rng.sample(range(len(whole)), 250), *range(len(whole) - 30, len(whole))]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            got = load_checkpoint(path)
        except InputError as error:
            found += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert torch.equal(got["a"], state["a"]) and torch.equal(got["deep"]["t"], state["deep"]["t"])
            assert got["n"] == 3
    assert found > 150


def test_checkpoints_carry_checksums_whatever_torch_is_set_to(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "c.pt", {"a": torch.arange(9)})
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "c.pt")["a"].tolist() == list(range(9))


def test_weights_of_a_model_carry_checksums_and_are_finite(tmp_path):
    """A file of another writer, without checksums, loads as it is; NaN and infinity are not saved."""
    model, folder = ReVQ(tiny_run().model), tmp_path / "m"
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    whole, expected = path.read_bytes(), copy.deepcopy(model.state_dict())

    def same(state):
        return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)

    assert same(load_file(path))  # the safetensors library reads it
    rng, found = random.Random(3), 0
    for place in rng.sample(range(len(whole)), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            got = ReVQ.from_pretrained(folder).state_dict()
        except InputError as error:
            found += 1
            assert "\n" not in str(error)
        else:
            assert same(got)  # in the padding of the header
    assert found > 40
    save_file({name: value.contiguous() for name, value in expected.items()}, path)
    assert same(ReVQ.from_pretrained(folder).state_dict())

    path.write_bytes(whole)
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.quantizer.codebook[1, 2, 0] = value
        with pytest.raises(InputError, match=r"quantizer\.codebook: expected finite weights"):
            model.save_pretrained(folder)
    assert path.read_bytes() == whole


def hostile_checkpoints(state):
    """Checkpoints with valid checksums whose content does not fit: name -> state."""
    changes = {
        "epoch": ["3", -1, 1.0, True, 10**6, None],
        "cursor": [-1, "x"],
        "step": [None, [1]],
        "sums": [torch.zeros(3), [0.0, 0.0], torch.zeros(2)],
        "last": [[1.0], "abc", None, [1, 2, 3], {}],
        "errors": [[1.0], 5],
        "about": [None, "", "[", "{}", "[1, 2, 3]", "[" * 10**5, '[{"train": 3}, "a", "b"]', "[{}, 1e999, null]"],
        "model": [{}, None, [1], {"quantizer.codebook": 3}],
        "optimizer": [{}, None, {"state": {}, "param_groups": []}, {"state": 3, "param_groups": 4}],
    }
    for name, values in changes.items():
        for number, value in enumerate(values):
            yield f"{name} {number}", {**state, name: value}
    other = copy.deepcopy(state)
    other["model"]["quantizer.codebook"] = other["model"]["quantizer.codebook"][:, :-1]
    yield "a smaller codebook", other
    other = copy.deepcopy(state)
    other["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    yield "a smaller moment", other
    other = copy.deepcopy(state)
    other["optimizer"]["state"][99] = other["optimizer"]["state"][0]
    yield "a moment of no parameter", other


def test_checkpoints_that_do_not_fit_are_one_line(tmp_path, one_thread):
    store, run = random_store(tmp_path / "store"), tiny_run(epochs=1)
    model = train(run, store, tmp_path / "run", progress=False).model
    path, about = tmp_path / "run" / "checkpoint.pt", about_run(run, store.fingerprint, None)
    state, before = load_checkpoint(path), copy.deepcopy(model.state_dict())
    assert state["about"] == about
    optimizer = torch.optim.AdamW([{"params": [model.quantizer.codebook]}, {"params": model.rectifier.parameters()}])
    for name, hostile in hostile_checkpoints(state):
        torch.save(hostile, path)
        with pytest.raises(InputError, match=r"checkpoint\.pt") as caught:
            RunState().resume(path, about, model, optimizer)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
    with pytest.raises(InputError, match=r"checkpoint\.pt"):
        train(run, store, tmp_path / "run", progress=False)
    result = train(run, store, tmp_path / "run", progress=False, overwrite=True)
    assert load_checkpoint(path)["step"] == result.steps


def test_a_full_disk_leaves_what_was_there(tmp_path, one_thread):
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    store, run = random_store(tmp_path / "store"), tiny_run(epochs=1)
    train(run, store, tmp_path / "run", progress=False)
    model = ReVQ.from_pretrained(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        for write in (
            lambda: save_checkpoint(tmp_path / "run" / "checkpoint.pt", {"a": torch.zeros(10**5)}),
            lambda: model.save_pretrained(tmp_path / "run" / "model"),
            lambda: train(tiny_run(epochs=2), store, tmp_path / "run", progress=False),
        ):
            with pytest.raises(OSError, match=r"checkpoint|File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    log = tmp_path / "run" / "metrics.jsonl"
    assert after.pop(log).startswith(before.pop(log)) and after == before
