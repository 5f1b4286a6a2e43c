"""Runs that meet trouble or an earlier run: refused, replaced, extended, interrupted, diverging, too large."""

import math
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pipeline_case import random_store, tiny_run

from revq.config import RectifierConfig
from revq.data.atomic import folder_lock
from revq.errors import InputError
from revq.interrupt import SIGNALS, Interrupted, signals_raise
from revq.model.revq import ReVQ
from revq.train import state
from revq.train.loop import train
from revq.train.state import load_checkpoint
from revq.train.track import read_records


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("store") / "latents")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("store") / "held_out", 64, seed=1)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_another_run_in_the_folder_is_refused_by_what_differs(tmp_path, store, validation):
    out = tmp_path / "run"
    train(tiny_run(epochs=2), store, out, progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = random_store(tmp_path / "s", seed=7)
    for run, latents, held_out, message in (
        (tiny_run(epochs=1), store, None, r"\(train\.epochs 2 -> 1\)"),
        (tiny_run(epochs=2), store, validation, r"\(other validation latents\)"),
        (tiny_run(epochs=2), other, None, r"\(other latents\)"),
        (
            tiny_run(epochs=3, codes=8, seed=1, rectifier=RectifierConfig("mlp", 8, 1)),
            other,
            None,
            r"\(model\.num_codes 16 -> 8, model\.rectifier\.width 16 -> 8, model\.rectifier\.form 'residual' -> 'absolute', "
            r"train\.seed 42 -> 1, other latents\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train(run, latents, out, validation=held_out, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"checkpoint\.pt: damaged"):
        train(tiny_run(epochs=2), store, out, progress=False)
    torch.save({"some": "thing"}, out / "checkpoint.pt")
    with pytest.raises(InputError, match="not a training checkpoint"):
        train(tiny_run(epochs=2), store, out, progress=False)
    (out / "checkpoint.pt").unlink()  # a model without its run
    with pytest.raises(InputError, match=r"holds a model without its run's checkpoint\.pt"):
        train(tiny_run(epochs=2), store, out, progress=False)


def test_overwrite_replaces_another_run_and_resumes_this_one(tmp_path, store):
    out = tmp_path / "run"
    train(tiny_run(epochs=2), store, out, progress=False)
    expected = train(tiny_run(epochs=2, seed=1), store, tmp_path / "fresh", progress=False).model
    for damage in (False, True):
        if damage:
            (out / "checkpoint.pt").write_bytes(b"damaged")
        got = train(tiny_run(epochs=2, seed=1), store, out, progress=False, overwrite=True).model
        assert_equal(weights(got), weights(expected))
        assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [6, 10, 12]
    log = (out / "metrics.jsonl").read_bytes()
    train(tiny_run(epochs=2, seed=1), store, out, progress=False, overwrite=True)
    assert (out / "metrics.jsonl").read_bytes() == log  # the same run is resumed: there was nothing left to do


@pytest.mark.parametrize("codes", [16, 64])
def test_a_run_is_extended(tmp_path, store, codes):
    """Finished or not: from the checkpoint on it is the longer run, with the schedule of the new length."""
    out = tmp_path / "run"
    train(tiny_run(epochs=2, codes=codes), store, out, progress=False)
    (out / "model" / "README.md").write_text("# mine")
    result = train(tiny_run(epochs=4, codes=codes), store, out, progress=False)
    assert result.steps == 24 and result.model.quantizer.count.sum() == 192 * 16  # counts of the last epoch only
    epochs = [record for record in read_records(out / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [record["step"] for record in epochs] == [6, 12, 18, 24]
    rates = [3e-2 * 0.05 ** (epoch / length) for epoch, length in ((0, 2), (1, 2), (2, 4), (3, 4))]
    assert [record["lr"] for record in epochs] == pytest.approx(rates)
    assert (out / "model" / "README.md").read_text() == "# mine"
    assert_equal(weights(ReVQ.from_pretrained(out)), weights(result.model))
    with pytest.raises(InputError, match=r"train\.epochs 4 -> 3"):
        train(tiny_run(epochs=3, codes=codes), store, out, progress=False)


def stop_at(monkeypatch, step, number=signal.SIGINT, times=1):
    """The process gets a signal while it is in its training step number ``step``."""
    steps, forward = [0], ReVQ.forward

    def wrapper(self, *args, **kwargs):
        steps[0] += self.training
        if self.training and steps[0] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ReVQ, "forward", wrapper)


@pytest.mark.parametrize(
    ("number", "step"), [*((signal.SIGINT, step) for step in (1, 4, 6, 18)), (signal.SIGTERM, 8), (signal.SIGHUP, 8)]
)
def test_an_interruption_saves_the_step(tmp_path, store, monkeypatch, step, number):
    """And the run ends with the weights of an uninterrupted one; also from within the last step."""
    expected = train(tiny_run(codes=64), store, tmp_path / "whole", progress=False).model
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch, signals_raise():
        stop_at(patch, step, number)
        with pytest.raises(Interrupted, match=f"step {step} is saved in .*checkpoint.pt") as caught:
            train(tiny_run(codes=64), store, tmp_path / "run", progress=False)
    assert caught.value.number == number
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == step
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    result = train(tiny_run(codes=64), store, tmp_path / "run", progress=False)
    assert_equal(weights(result.model), weights(expected))


def test_a_second_interruption_stops_at_once(tmp_path, store, monkeypatch):
    for step, saved in ((3, "nothing is saved"), (8, "step 6 is saved")):
        with monkeypatch.context() as patch:
            stop_at(patch, step, times=2)
            with pytest.raises(Interrupted, match=saved):
                train(tiny_run(), store, tmp_path / str(step), progress=False)
        assert (tmp_path / str(step) / "checkpoint.pt").exists() == (step == 8)


def test_an_interruption_after_a_checkpoint_is_in_place_says_its_step(tmp_path, store, monkeypatch):
    save = state.save_checkpoint

    def save_and_stop(path, values):
        save(path, values)
        if values["step"] == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(state, "save_checkpoint", save_and_stop)
    with pytest.raises(Interrupted, match="step 12 is saved"):
        train(tiny_run(), store, tmp_path / "run", progress=False)


def test_training_in_a_thread(tmp_path, store):
    """Python lets the main thread alone handle signals."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, tiny_run(epochs=1), store, tmp_path / "run", progress=False).result().steps == 6


def test_an_unfinished_run_is_extended(tmp_path, store, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Interrupted):
            train(tiny_run(epochs=2), store, tmp_path / "run", progress=False)
    result = train(tiny_run(epochs=3), store, tmp_path / "run", progress=False)
    epochs = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert result.steps == 18 and [record["step"] for record in epochs] == [6, 12, 18]
    rates = [3e-2 * 0.05 ** (epoch / length) for epoch, length in ((0, 2), (1, 3), (2, 3))]
    assert [record["lr"] for record in epochs] == pytest.approx(rates)


def test_handlers_of_the_host_program_are_left_alone(tmp_path, store, monkeypatch):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *args: calls.append(args))
    try:
        stop_at(monkeypatch, 2, signal.SIGTERM)
        train(tiny_run(epochs=1), store, tmp_path / "run", progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 1


DIVERGING = [
    {"learning_rate": 3e38},
    {"learning_rate": 1e30, "clip_norm": 0},
    {"learning_rate": 3e38, "epochs": 1, "batch_size": 200},  # one step: no loss of the broken model is ever computed
    {"learning_rate": 3e38, "checkpoint_every": 1},
    {"rectifier_weight_decay": 3e38},
    {"rectifier_lr_ratio": 3e38},
    {"reset_noise": 3e38, "codes": 64},
]


@pytest.mark.parametrize("options", DIVERGING, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "identity"])
def test_a_run_that_diverges_saves_nothing_that_is_not_finite(tmp_path, store, options, kind):
    """Numbers that are finite and still break a run: what is on disk is finite, or nothing is."""
    if kind == "identity" and not options.keys() & {"learning_rate", "reset_noise"}:
        pytest.skip("without weights of the rectifier nothing diverges")
    out = tmp_path / "run"
    with pytest.raises(InputError, match="learning_rate: training diverged in epoch") as caught:
        train(tiny_run(rectifier=RectifierConfig(kind, 16, 1), **options), store, out, progress=False)
    assert "\n" not in str(caught.value) and re.search(r"(is|are|is not finite \() ?-?(nan|inf)", str(caught.value))
    assert not (out / "model").exists()
    if (out / "checkpoint.pt").exists():
        saved = load_checkpoint(out / "checkpoint.pt")
        assert f"step {saved['step']} is kept" in str(caught.value)
        tensors = [*saved["model"].values(), *(t for s in saved["optimizer"]["state"].values() for t in s.values())]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    else:
        assert "nothing was saved" in str(caught.value)
    read_records(out / "metrics.jsonl")  # holds finite numbers alone


@pytest.mark.parametrize("what", ["weight", "moment", "statistic"])
def test_the_last_good_checkpoint_survives(tmp_path, store, monkeypatch, what):
    """A weight, a moment or a statistic becomes NaN in epoch 1: the checkpoint of epoch 0 stays and resumes."""
    step, forward, calls, models = torch.optim.AdamW.step, ReVQ.forward, [], []

    def breaking_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == 12:
            parameter = models[-1].rectifier.fc_out.weight
            tensors = {
                "weight": parameter,
                "moment": self.state[parameter]["exp_avg"],
                "statistic": models[-1].normalizer.std,
            }
            tensors[what].data.view(-1)[3] = math.nan

    def noted_forward(self, *args, **kwargs):
        models.append(self)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", breaking_step)
        patch.setattr(ReVQ, "forward", noted_forward)
        with pytest.raises(InputError, match=r"in epoch 1, step 12: .*of step 6 is kept") as caught:
            train(tiny_run(), store, tmp_path / "run", progress=False)
    if what == "moment":
        assert "exp_avg of rectifier.fc_out.weight is not finite (nan at [0, 3])" in str(caught.value)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 6
    expected = train(tiny_run(), store, tmp_path / "whole", progress=False).model
    assert_equal(weights(train(tiny_run(), store, tmp_path / "run", progress=False).model), weights(expected))


def test_latents_that_are_not_finite(tmp_path, store):
    """The writer of stores refuses them; a store that holds some all the same is refused before any step."""
    for value in (math.nan, math.inf):
        for name in ("store", "validation"):
            bad = random_store(tmp_path / f"{name} {value}", 64)
            rows = bad.rows

            def broken(indices, rows=rows, value=value):
                latents = rows(indices)
                latents[-1, 0, 1, 2] = value
                return latents

            bad.rows = broken
            stores = {"store": store, "validation": None} | {name: bad}
            with pytest.raises(InputError, match="expected finite") as caught:
                train(tiny_run(), stores["store"], tmp_path / "run", validation=stores["validation"], progress=False)
            assert name == "store" or "validation: expected finite latents" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "model").exists()


def test_a_run_named_model_holds_its_model(tmp_path, store):
    result = train(tiny_run(epochs=1), store, tmp_path / "model", progress=False)
    names = {"checkpoint.pt", "metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    assert_equal(weights(ReVQ.from_pretrained(tmp_path / "model")), weights(result.model))
    again = train(tiny_run(epochs=1), store, tmp_path / "model", progress=False)
    assert_equal(weights(again.model), weights(result.model))
    train(tiny_run(epochs=2), store, tmp_path / "model", progress=False)
    assert {path.name for path in (tmp_path / "model").iterdir()} == names


def test_one_process_at_a_time(tmp_path, store):
    with folder_lock(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        train(tiny_run(epochs=1), store, tmp_path / "run", progress=False)
    train(tiny_run(epochs=1), store, tmp_path / "run", progress=False)


def test_a_model_beyond_memory_is_refused_unmade(tmp_path, store):
    for run in (
        tiny_run(codes=2**31 - 1, init="normal"),
        tiny_run(rectifier=RectifierConfig("mlp", 2**31 - 1, 1)),
        tiny_run(rectifier=RectifierConfig("mlp", 10**5, 3)),
    ):
        with pytest.raises(InputError, match=r"GiB to train, cpu has|expected a model of at most"):
            train(run, store, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
