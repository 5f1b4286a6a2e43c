"""What the released code does and the paper does not, as options of training; and the BatchNorm of the mlp rectifier."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipeline_case import random_store, tiny_run

from revq.config import RectifierConfig
from revq.errors import InputError
from revq.eval.evaluate import latent_errors
from revq.model.revq import ReVQ
from revq.train.loop import train
from revq.train.state import generator, load_checkpoint, save_checkpoint
from revq.train.track import read_records

CODES, GROUPS = 48, 16
RELEASE = {
    "reset_first_epoch": False,
    "reset_last_epoch": True,
    "reset_keep_moments": True,
    "count_validation": True,
}
PAIRS = {"reset_pairing": "release", "reset_max_fraction": 0.2}
CASES = [{}, *({name: value} for name, value in RELEASE.items()), RELEASE, {**RELEASE, **PAIRS}, PAIRS]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("store") / "latents")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("store") / "held_out", 64, seed=1)


def identity_run(**options):
    """At a learning rate at which codes that were used die later: they have moments to keep or to clear."""
    return tiny_run(codes=CODES, rectifier=RectifierConfig("identity"), **{"learning_rate": 0.3, **options})


@pytest.fixture(scope="module")
def start(store, tmp_path_factory):
    """Codes that did not move yet, float32 ``[G, K, d]``, and the normalizer."""
    run = identity_run(epochs=1, learning_rate=1e-30)
    model = train(run, store, tmp_path_factory.mktemp("start") / "run", progress=False).model
    return model.quantizer.codebook.detach(), model.normalizer


def chosen(codes, normalizer, latents):
    """Tokens ``[B, G, d]`` and the nearest codes ``[B, G]``."""
    tokens = normalizer.normalize(latents).reshape(-1, GROUPS, 4)
    return tokens, (tokens[:, :, None] - codes).square().sum(-1).argmin(-1)


def pairs(count, options):
    """(target, source) of one group: sort by falling count, the last dead codes become the first codes (release)."""
    dead = int((count == 0).sum())
    r = min(dead, int(options.reset_max_fraction * CODES))
    if options.reset_pairing == "release":
        falling = np.argsort(-count, kind="stable")
        return list(zip(falling[CODES - r :], falling[:r], strict=True))
    rising = np.argsort(count, kind="stable")
    return [(rising[u], rising[CODES - 1 - u]) for u in range(r) if count[rising[CODES - 1 - u]]]


def written_out(options, start, store, validation):
    """Training with the identity as rectifier, written out: codes, moments, moved codes per epoch, counts of the last."""
    codes, normalizer = start[0].clone().requires_grad_(), start[1]
    optimizer = torch.optim.AdamW([codes], weight_decay=0.0)
    count, moved_codes = torch.zeros(GROUPS, CODES, dtype=torch.int64), []
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = options.learning_rate * 0.05 ** (epoch / 3)
        for rows in torch.randperm(200, generator=generator(options.seed, epoch, "order"))[:192].split(32):
            tokens, indices = chosen(codes.detach(), normalizer, store.rows(rows))
            count += F.one_hot(indices, CODES).sum(0)
            optimizer.zero_grad()
            (codes[torch.arange(GROUPS), indices] - tokens).square().mean().backward()
            torch.nn.utils.clip_grad_norm_([codes], 1.0)
            optimizer.step()
        last = count
        moved = torch.zeros(GROUPS, CODES, dtype=torch.bool)
        if (epoch != 0 or options.reset_first_epoch) and (epoch != 2 or options.reset_last_epoch):
            before = codes.detach().clone()
            for group in range(GROUPS):
                for target, source in pairs(count[group].numpy(), options):
                    moved[group, target] = True
                    codes.data[group, target] = before[group, source]
            noise = torch.randn(int(moved.sum()), 4, generator=generator(options.seed, epoch, "reset"))
            codes.data[moved] += options.reset_noise * noise
        moved_codes.append(int(moved.sum()))
        if not options.reset_keep_moments:
            optimizer.state[codes]["exp_avg"][moved] = 0
            optimizer.state[codes]["exp_avg_sq"][moved] = 0
        count = torch.zeros_like(count)
        if options.count_validation:
            count += F.one_hot(chosen(codes.detach(), normalizer, validation.rows(range(64)))[1], CODES).sum(0)
    return codes.detach(), optimizer.state[codes], moved_codes, last


@pytest.mark.parametrize("changes", CASES, ids=lambda case: "+".join(case) or "none")
def test_training_is_the_procedure_written_out(tmp_path, store, validation, start, changes):
    run = identity_run(**changes)
    got = train(run, store, tmp_path / "run", validation=validation, progress=False)
    codes, moments, moved, last = written_out(run.train, start, store, validation)
    records = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
    assert [record["moved_codes"] for record in records] == moved
    assert [count > 0 for count in moved] == [run.train.reset_first_epoch, True, run.train.reset_last_epoch]
    assert torch.equal(got.model.quantizer.count, last)  # of the last epoch, also where a reset follows it
    torch.testing.assert_close(got.model.quantizer.codebook.detach(), codes, rtol=0, atol=2e-5)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["optimizer"]["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], moments[name], rtol=1e-3, atol=1e-6)
    if changes:  # the procedure without the option gives something else, so that the comparison could fail
        other = written_out(identity_run().train, start, store, validation)
        assert not torch.allclose(codes, other[0], rtol=0, atol=0.01)


@pytest.mark.parametrize("changes", [RELEASE, {"reset_last_epoch": True}, {**RELEASE, **PAIRS}], ids=len)
def test_a_run_with_a_reset_after_the_last_epoch_can_be_extended(tmp_path, store, validation, changes):
    """At a constant learning rate nothing but that reset tells a last epoch from another: equal bits."""
    options = {"codes": CODES, "lr_floor": 1.0, **changes}
    train(tiny_run(epochs=2, **options), store, tmp_path / "run", validation=validation, progress=False)
    got = train(tiny_run(epochs=3, **options), store, tmp_path / "run", validation=validation, progress=False)
    whole = train(tiny_run(epochs=3, **options), store, tmp_path / "whole", validation=validation, progress=False)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name
    assert got[1:] == whole[1:]


def without_new_fields(path, **changes):
    """The checkpoint as a version wrote it that did not have the four options."""
    state = load_checkpoint(path)
    config, *stores = json.loads(state["about"])
    config["train"] = {name: value for name, value in (config["train"] | changes).items() if name not in RELEASE}
    save_checkpoint(path, state | {"about": json.dumps([config, *stores])})


def test_checkpoints_from_before_the_options(tmp_path, store, validation):
    """A field that is missing is at its default; the earlier pairs of the release are not continued by other pairs."""
    expected = train(tiny_run(codes=CODES), store, tmp_path / "whole", validation=validation, progress=False).model
    out = tmp_path / "run"
    train(tiny_run(codes=CODES), store, out, validation=validation, progress=False)
    without_new_fields(out / "checkpoint.pt")
    for name, value in RELEASE.items():
        with pytest.raises(InputError, match=rf"\(train\.{name} {not value} -> {value}\)"):
            train(tiny_run(codes=CODES, **{name: value}), store, out, validation=validation, progress=False)
    got = train(tiny_run(codes=CODES), store, out, validation=validation, progress=False).model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name

    without_new_fields(out / "checkpoint.pt", reset_pairing="release")
    again = train(tiny_run(codes=CODES, reset_pairing="release"), store, out, validation=validation, progress=False)
    assert torch.equal(again.model.quantizer.codebook, expected.quantizer.codebook)  # it is finished
    with pytest.raises(InputError, match="paired other codes; commit 4d4a8f7 is the last that resumes it") as caught:
        train(
            tiny_run(codes=CODES, reset_pairing="release", epochs=4), store, out, validation=validation, progress=False
        )
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(tmp_path, store):
    mlp = RectifierConfig("mlp", 16, 1)
    with pytest.raises(InputError, match="count_validation: expected validation latents to count, got none"):
        train(tiny_run(count_validation=True), store, tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"batch_size: expected at least 2 for the BatchNorm .*, got 1"):
        train(tiny_run(batch_size=1, rectifier=mlp), store, tmp_path / "run", progress=False)
    one = random_store(tmp_path / "one", rows=1)
    with pytest.raises(InputError, match=r"store: expected two latents or more for the BatchNorm .*, got 1"):
        train(tiny_run(init="normal", rectifier=mlp), one, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    for kind in ("cnn", "identity"):
        run = tiny_run(epochs=1, batch_size=1, codes=1, rectifier=RectifierConfig(kind, 16, 1))
        assert train(run, one, tmp_path / kind, validation=one, progress=False).steps == 1
    run = tiny_run(epochs=1, rectifier=mlp)
    train(run, store, tmp_path / "run", validation=one, progress=False)  # a validation of one latent is in eval mode


def test_batch_norm_follows_the_training_batches_alone(tmp_path, store, validation):
    """Validation, checks of the model and decoding leave the running statistics; checkpoints and models carry them."""
    run = tiny_run(codes=CODES, rectifier=RectifierConfig("mlp", 16, 2), learning_rate=1e-30, reset=False)
    plain = train(run, store, tmp_path / "plain", progress=False).model
    validated = train(run, store, tmp_path / "run", validation=validation, progress=False)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(validated.model.state_dict()[name], tensor), name

    # The weights do not move: float64 statistics of the first layers over the 18 batches, a tenth for each.
    model, block = validated.model, validated.model.rectifier.prelayers[0]
    mean, var = np.zeros(16), np.ones(16)
    first, second = (
        [tensor.detach().double().numpy() for tensor in layer.parameters()] for layer in (block.fc1, block.fc2)
    )
    for epoch in range(3):
        for rows in torch.randperm(200, generator=generator(42, epoch, "order"))[:192].split(32):
            latents = model.normalizer.normalize(
                model.decode_tokens(model.encode_latents(store.rows(rows)), rectify=False)
            )
            hidden = latents.flatten(1).double().numpy() @ first[0].T + first[1]
            hidden = hidden / (1 + np.exp(-hidden)) @ second[0].T + second[1]
            mean, var = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * var + 0.1 * hidden.var(0, ddof=1)
    np.testing.assert_allclose(block.norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(block.norm.running_var, var, rtol=1e-4, atol=1e-6)
    assert int(block.norm.num_batches_tracked) == validated.steps == 18

    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"]
    loaded = ReVQ.from_pretrained(tmp_path / "run").state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert latent_errors(model, validation) == latent_errors(model, validation, batch_size=64) == validated.validation
    tokens = model.encode_latents(validation.rows(range(5)))
    torch.testing.assert_close(model.decode_tokens(tokens)[:1], model.decode_tokens(tokens[:1]))
    assert model.rectifier.training and model.rectifier.prelayers[0].norm.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and torch.equal(tensor, saved[name]), name
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_models_with_the_earlier_cnn_and_mlp_are_refused(tmp_path, kind):
    """By a tensor that those models alone have, whatever the widths; one line names the commit that reads them."""
    from safetensors.torch import load_file, save_file

    ReVQ(tiny_run(rectifier=RectifierConfig(kind, 16, 2)).model).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items() if not name.startswith("rectifier.")}
    earlier = {"cnn": ("up_blocks.0.0.conv1.weight", (24, 24, 3, 3)), "mlp": ("blocks.0.norm.weight", (24,))}
    name, shape = earlier[kind]
    save_file(state | {f"rectifier.{name}": torch.zeros(shape), "rectifier.conv_in.weight": torch.zeros(3)}, path)
    with pytest.raises(
        InputError, match=rf"model\.safetensors: expected the {kind} rectifier .* commit 4d4a8f7 is"
    ) as caught:
        ReVQ.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
