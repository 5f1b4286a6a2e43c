"""The training loop: it learns, equals the algorithm written out, starts from training vectors, logs, and refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from pipeline_case import SHAPE, random_store, tiny_run

from revq.config import RectifierConfig
from revq.data.latent_writer import save_latents
from revq.errors import InputError
from revq.eval.evaluate import latent_errors
from revq.model.revq import ReVQ, read_origin
from revq.train.loop import train
from revq.train.state import derived_seed, generator
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


def test_it_learns_and_saves(tmp_path, store, validation):
    run = tiny_run(epochs=12)
    result = train(run, store, tmp_path / "run", validation=validation, progress=False)
    epochs = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert epochs[-1]["quantizer_loss"] < 0.85 * epochs[0]["quantizer_loss"]
    assert result.validation.rectified < 0.97 * result.validation.quantized
    assert result.validation.quantized < epochs[0]["validation_quantized"]
    assert result.steps == 12 * (200 // 32)

    loaded = ReVQ.from_pretrained(tmp_path / "run" / "model")
    assert_equal(weights(loaded), weights(result.model))
    assert latent_errors(loaded, validation) == result.validation
    assert read_origin(tmp_path / "run" / "model" / "tokenizer.json") == ("tiny", "f00d", 64)
    assert not result.model.training


def test_statistics_and_first_codes(tmp_path, store):
    """At a learning rate of nearly zero the codes stay at their initial values: distinct training vectors."""
    run = tiny_run(epochs=1, learning_rate=1e-30)
    model = train(run, store, tmp_path / "run", progress=False).model
    everything = store.rows(range(len(store))).double()
    torch.testing.assert_close(model.normalizer.mean.double(), everything.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.normalizer.std.double(), everything.std(0, correction=0), rtol=1e-6, atol=1e-6)
    tokens = model.normalizer.normalize(store.rows(range(len(store)))).reshape(200, 16, 4)
    for group, codes in enumerate(model.quantizer.codebook):
        rows = (codes[:, None] - tokens[None, :, group]).abs().amax(-1)  # [K, N]
        assert rows.min(dim=1).values.max() < 1e-6
        assert len(set(rows.argmin(dim=1).tolist())) == run.model.num_codes  # without replacement


def test_loop_equals_the_algorithm_written_out(tmp_path, store):
    """Two epochs written out independently: MSE of gathered codes, AdamW, clipping, the schedule, Eq. 2."""
    run = tiny_run(epochs=2, clip_norm=0.05, codes=48, rectifier=RectifierConfig("cnn", 16, 1))
    options = run.train
    got = train(run, store, tmp_path / "run", progress=False).model

    first = train(
        tiny_run(epochs=1, learning_rate=1e-30, codes=48, rectifier=run.model.rectifier), store, tmp_path / "first"
    )
    torch.manual_seed(derived_seed(options.seed, 0, "modules"))
    rectifier = ReVQ(run.model).rectifier
    codes = first.model.quantizer.codebook.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": [codes], "weight_decay": 0.0}, {"params": rectifier.parameters()}], lr=1.0
    )
    group_of = torch.arange(16)
    moved_in_all = 0
    for epoch in range(2):
        count = torch.zeros(16, 48, dtype=torch.int64)
        lr = options.learning_rate * math.exp(math.log(0.05) * epoch / 2)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.param_groups[1].update(lr=0.05 * lr, weight_decay=1e-4)
        for rows in torch.randperm(200, generator=generator(options.seed, epoch, "order"))[:192].split(32):
            z = first.model.normalizer.normalize(store.rows(rows))
            tokens = z.reshape(32, 16, 4)
            indices = (tokens[:, :, None] - codes.detach()).square().sum(-1).argmin(-1)  # [32, 16]
            count += F.one_hot(indices, 48).sum(0)
            quantized = codes[group_of, indices].reshape(z.shape)
            optimizer.zero_grad()
            ((quantized - z).square().mean() + (rectifier(quantized.detach()) - z).square().mean()).backward()
            for parameters in ([codes], list(rectifier.parameters())):
                norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters))
                for parameter in parameters:
                    parameter.grad *= min(1.0, 0.05 / norm)
            optimizer.step()
        if epoch == 0:  # Eq. 2; the noise is drawn for moved rows only, in order
            moved = torch.zeros(16, 48, dtype=torch.bool)
            source = codes.detach().clone()
            for group in range(16):
                order = sorted(range(48), key=lambda code: (int(count[group, code]), code))
                for place, code in enumerate(order):
                    partner = order[47 - place]
                    if count[group, code] == 0 and count[group, partner] > 0:
                        moved[group, code] = True
                        codes.data[group, code] = source[group, partner]
            noise = torch.randn(int(moved.sum()), 4, generator=generator(options.seed, 0, "reset"))
            codes.data[moved] += options.reset_noise * noise
            moved_in_all = int(moved.sum())
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[codes][moment][moved] = 0
    assert moved_in_all > 0
    torch.testing.assert_close(got.quantizer.codebook, codes, rtol=0, atol=2e-5)
    for name, parameter in rectifier.named_parameters():
        torch.testing.assert_close(got.rectifier.get_parameter(name), parameter, rtol=0, atol=2e-5)
    assert torch.equal(got.quantizer.count, count)


def test_log(tmp_path, store, validation):
    train(tiny_run(codes=64), store, tmp_path / "run", validation=validation, log_every=2, progress=False)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [(record["epoch"], record["step"]) for record in epochs] == [(0, 6), (1, 12), (2, 18)]
    assert all(record["lr"] == pytest.approx(3e-2 * 0.05 ** (record["epoch"] / 3)) for record in records)
    assert epochs[0]["moved_codes"] > 0 and epochs[-1]["moved_codes"] == 0  # nothing is reset after the last epoch
    for record in epochs:
        assert 1 <= record["perplexity"] <= 64 and 0 < record["lowest_utilization"] <= record["utilization"] <= 1
        assert record["validation_rectified"] > 0 and record["validation_quantized"] > 0 and record["seconds"] > 0


def test_reset_uses_more_codes(tmp_path, store):
    used = {}
    for reset in (True, False):
        run = tiny_run(codes=64, init="normal", reset=reset, epochs=6)
        result = train(run, store, tmp_path / str(reset), progress=False)
        used[reset] = result.last_epoch.utilization
        assert result.model.quantizer.count.sum() == 192 * 16  # counts of the last epoch only
    assert used[True] > used[False] + 0.1


def test_joint_loss_is_equation_4(tmp_path, store):
    """One step: the rectifier's loss alone trains the codebook.  With the identity as rectifier both losses are equal."""
    identity = RectifierConfig("identity")
    one = {"epochs": 1, "batch_size": 200}
    joint = train(tiny_run(rectifier=identity, loss="joint", **one), store, tmp_path / "a", progress=False).model
    separate = train(tiny_run(rectifier=identity, loss="separate", **one), store, tmp_path / "b", progress=False).model
    assert torch.equal(joint.quantizer.codebook, separate.quantizer.codebook)
    absolute = RectifierConfig("mlp", 16, 1)
    joint = train(tiny_run(rectifier=absolute, loss="joint", **one), store, tmp_path / "c", progress=False).model
    separate = train(tiny_run(rectifier=absolute, loss="separate", **one), store, tmp_path / "d", progress=False).model
    assert not torch.equal(joint.quantizer.codebook, separate.quantizer.codebook)
    for name, parameter in joint.rectifier.named_parameters():
        torch.testing.assert_close(parameter, separate.rectifier.get_parameter(name))


def test_the_global_generator_is_unchanged(tmp_path, store):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = train(tiny_run(epochs=1, codes=64), store, tmp_path / "a", progress=False).model
    assert torch.equal(torch.rand(4), expected)
    assert_equal(
        weights(first), weights(train(tiny_run(epochs=1, codes=64), store, tmp_path / "b", progress=False).model)
    )
    other = train(tiny_run(epochs=1, codes=64, seed=43), store, tmp_path / "c", progress=False).model
    assert not torch.equal(other.quantizer.codebook, first.quantizer.codebook)


def test_few_latents_make_one_smaller_batch(tmp_path):
    store = random_store(tmp_path / "s", rows=20)
    result = train(tiny_run(epochs=4), store, tmp_path / "run", progress=False)
    assert result.steps == 4 and result.validation is None
    assert result.model.quantizer.count.sum(dim=1).tolist() == [20] * 16


def test_again_after_the_end_gives_the_same(tmp_path, store, validation):
    first = train(tiny_run(), store, tmp_path / "run", validation=validation, progress=False)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(tiny_run(), store, tmp_path / "run", validation=validation, progress=False)
    assert_equal(weights(first.model), weights(again.model))
    assert again[1:] == first[1:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log


def test_wrong_inputs(tmp_path, store, validation):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"K=256 codes.*only 200 per codebook"):
        train(tiny_run(codes=256), store, out, progress=False)
    wrong_shape = random_store(tmp_path / "other", 40, shape=(4, 4, 2))
    with pytest.raises(InputError, match="store: expected latents"):
        train(tiny_run(), wrong_shape, out, progress=False)
    with pytest.raises(InputError, match="validation: expected latents"):
        train(tiny_run(), store, out, validation=wrong_shape, progress=False)
    other_vae = save_latents(tmp_path / "vae", torch.randn(40, *SHAPE), vae="other", vae_fingerprint="beef")
    with pytest.raises(InputError, match="another VAE"):
        train(tiny_run(), store, out, validation=other_vae, progress=False)
    with pytest.raises(InputError, match="log_every"):
        train(tiny_run(), store, out, log_every=0, progress=False)
    assert not out.exists()

    with pytest.raises(InputError, match="learning_rate: training diverged in epoch 0"):
        train(tiny_run(learning_rate=1e38, clip_norm=0), store, tmp_path / "diverged", progress=False)
    assert not (tmp_path / "diverged" / "model").exists()
