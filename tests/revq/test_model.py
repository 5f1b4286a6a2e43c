"""ReVQ on latents: results, gradients, and the model folder."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from revq.config import ModelConfig, RectifierConfig
from revq.data.atomic import atomic_folder
from revq.errors import InputError
from revq.model.normalizer import LatentStatistics
from revq.model.revq import ReVQ

SHAPE = (4, 4, 8)


def tiny_model(*, kind="cnn", form="residual", groups=None, split="channel", codes=12):
    rectifier = RectifierConfig(kind, width=32, layers=1, form=form)
    model = ReVQ(
        ModelConfig(SHAPE, num_tokens=32, num_codes=codes, num_groups=groups, split=split, rectifier=rectifier)
    )
    statistics = LatentStatistics()
    statistics.update(latents(64))
    model.normalizer.fit_(statistics)
    with torch.no_grad():  # not the identity, so that rectified and quantized latents differ
        for parameter in model.rectifier.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


def latents(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator) * torch.linspace(0.5, 9, 128).view(SHAPE) + 3


def numpy_tokens(model, batch, split, groups):
    """Eq. 1 in float64, by brute force."""
    mean, std = model.normalizer.mean.double().numpy(), model.normalizer.std.double().numpy()
    z = (batch.double().numpy() - mean) / std
    order = (0, 1, 2, 3) if split == "channel" else (0, 2, 3, 1)
    tokens = z.transpose(order).reshape(len(z), 32, 4)
    codebook = model.quantizer.codebook.detach().double().numpy()[np.arange(32) % groups]  # [T, K, d]
    distances = ((tokens[:, :, None] - codebook) ** 2).sum(-1)  # [B, T, K]
    indices = distances.argmin(-1)
    quantized = codebook[np.arange(32), indices]  # [B, T, d]
    shape = SHAPE if split == "channel" else (*SHAPE[1:], SHAPE[0])
    quantized = quantized.reshape(len(z), *shape)
    quantized = quantized if split == "channel" else quantized.transpose(0, 3, 1, 2)
    return indices, quantized * std + mean, ((quantized - z) ** 2).mean()


@pytest.mark.parametrize("split", ["channel", "space"])
@pytest.mark.parametrize("groups", [32, 8, 1])
def test_tokens_and_quantized_latents_equal_brute_force(split, groups):
    model, batch = tiny_model(groups=groups, split=split).eval(), latents(5, seed=2)
    indices, quantized, loss = numpy_tokens(model, batch, split, groups)
    out = model(batch)
    assert np.array_equal(out.indices.numpy(), indices)
    assert out.indices.dtype == torch.int64
    assert torch.equal(model.encode_latents(batch), out.indices)
    np.testing.assert_allclose(model.decode_tokens(out.indices, rectify=False).numpy(), quantized, atol=1e-4)
    assert float(out.quantizer_loss.detach()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["efficientvit", "cnn", "mlp", "identity"])
@pytest.mark.parametrize("form", ["absolute", "residual"])
def test_forward_agrees_with_encode_then_decode(kind, form):
    model, batch = tiny_model(kind=kind, form=form).eval(), latents(3, seed=4)
    out = model(batch)
    decoded = model.decode_tokens(model.encode_latents(batch))
    torch.testing.assert_close(out.latents, decoded, atol=1e-5, rtol=1e-5)
    quantized = model.normalizer.normalize(model.decode_tokens(out.indices, rectify=False))
    expected = model.normalizer.denormalize(model.rectifier(quantized))
    torch.testing.assert_close(decoded, expected, atol=1e-3, rtol=1e-4)
    error = (model.normalizer.normalize(decoded) - model.normalizer.normalize(batch)).square().mean()
    torch.testing.assert_close(out.rectifier_loss, error, atol=1e-5, rtol=1e-4)


def gradients(joint, which):
    model = tiny_model()
    out = model(latents(6), joint=joint)
    getattr(out, which).backward()
    rectifier = [p.grad for p in model.rectifier.parameters()]
    return model.quantizer.codebook.grad, rectifier


@pytest.mark.parametrize("joint", [False, True])
def test_the_quantizer_loss_trains_the_codebook_alone(joint):
    codebook, rectifier = gradients(joint, "quantizer_loss")
    assert codebook.abs().sum() > 0
    assert all(gradient is None for gradient in rectifier)


@pytest.mark.parametrize("joint", [False, True])
def test_the_rectifier_loss_reaches_the_codebook_only_if_joint(joint):
    codebook, rectifier = gradients(joint, "rectifier_loss")
    assert all(gradient.abs().sum() > 0 for gradient in rectifier)
    assert (codebook is not None and codebook.abs().sum() > 0) if joint else codebook is None


def test_the_joint_gradient_is_that_of_equation_4():
    model, batch = tiny_model(kind="mlp", groups=8), latents(3)
    out = model(batch, joint=True)
    out.rectifier_loss.backward()
    # the same loss from the chosen codes, in float64, with fixed indices
    double, target = copy.deepcopy(model).double(), model.normalizer.normalize(batch)
    double.zero_grad()
    codes = double.quantizer.codebook[torch.arange(32) % 8, out.indices].reshape(3, *SHAPE)
    (double.rectifier(codes) - target.double()).square().mean().backward()
    torch.testing.assert_close(
        model.quantizer.codebook.grad.double(), double.quantizer.codebook.grad, atol=1e-6, rtol=1e-4
    )


def test_latents_receive_no_gradient():
    batch = latents(2).requires_grad_()
    out = tiny_model()(batch, joint=True)
    (out.rectifier_loss + out.quantizer_loss).backward()
    assert batch.grad is None


def test_only_training_counts():
    model, batch = tiny_model(), latents(7)
    model.eval()(batch)
    model.train().encode_latents(batch)
    assert model.quantizer.count.sum() == 0
    model(batch)
    assert torch.equal(model.quantizer.count.sum(1), torch.full((32,), 7))


def test_tokens_do_not_depend_on_batch_dtype_or_strides():
    model, batch = tiny_model(), latents(9).half()
    whole = model.encode_latents(batch)
    assert torch.equal(whole, torch.cat([model.encode_latents(row[None].double()) for row in batch]))
    strided = batch.float().to(memory_format=torch.channels_last)
    assert torch.equal(whole, model.encode_latents(strided))
    assert model.encode_latents(batch[:0]).shape == (0, 32)


@pytest.mark.parametrize("method", ["forward", "encode_latents"])
def test_unusable_latents_are_refused(method):
    call = getattr(tiny_model(), method)
    with pytest.raises(InputError, match=r"latents: expected shape \[B, 4, 4, 8\], got \[2, 4, 4, 4\]"):
        call(torch.zeros(2, 4, 4, 4))
    with pytest.raises(InputError, match=r"got \[4, 4, 8\]"):
        call(torch.zeros(SHAPE))
    with pytest.raises(InputError, match=r"latents: expected a floating point dtype, got torch\.int64"):
        call(torch.zeros(1, *SHAPE, dtype=torch.int64))


def test_unusable_tokens_are_refused():
    model = tiny_model()
    good = model.encode_latents(latents(2))
    assert torch.equal(model.decode_tokens(good), model.decode_tokens(good.to(torch.uint8)))
    for bad in (12, -1):
        tokens = good.clone()
        tokens[1, 3] = bad
        with pytest.raises(InputError, match=rf"indices: expected values in \[0, num_codes=12\), .*{bad}"):
            model.decode_tokens(tokens)
    with pytest.raises(InputError, match=r"expected shape \[B, num_tokens=32\], got \[2, 31\]"):
        model.decode_tokens(good[:, :31])
    with pytest.raises(InputError, match=r"indices: expected an integer dtype, got torch\.float32"):
        model.decode_tokens(good.float())


def test_a_saved_model_loads_bit_for_bit(tmp_path):
    model, batch = tiny_model(kind="efficientvit", groups=8, split="space"), latents(4)
    model(batch)
    model.save_pretrained(tmp_path / "deep" / "model")
    loaded = ReVQ.from_pretrained(tmp_path / "deep" / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.quantizer.count.sum() == 4 * 32
    assert torch.equal(
        loaded.decode_tokens(loaded.encode_latents(batch)), model.decode_tokens(model.encode_latents(batch))
    )
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(batch).rectifier_loss.backward()  # the residual form's hook is restored, too
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model"]


def test_parameters_have_the_official_rectifier_names(tmp_path):
    tiny_model(kind="efficientvit").save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {"normalizer.mean", "normalizer.std", "quantizer.codebook", "quantizer.count"} <= names
    assert {"rectifier.conv_in.weight", "rectifier.up_blocks.0.0.attn.to_q.weight", "rectifier.norm_out.bias"} <= names


def test_saving_replaces_a_model_but_nothing_else(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_model().save_pretrained(folder)
    other = tiny_model(kind="mlp", codes=5)
    other.save_pretrained(folder)
    assert ReVQ.from_pretrained(folder).config == other.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    foreign = {
        "thesis.txt": b"years",
        ".DS_Store": b"\0",
        "README.md": b"# mine",
        ".gitattributes": b"*",
        "Thumbs.db": b"",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"png")
    (folder / "link").symlink_to("thesis.txt")
    other = tiny_model(codes=6)
    other.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign
    assert (folder / "plots" / "a.png").read_bytes() == b"png" and (folder / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="found a file"):
        tiny_model().save_pretrained(tmp_path / "file")
    assert ReVQ.from_pretrained(folder).config == other.config


@pytest.mark.parametrize("exchange", [True, False], ids=["swap", "two renames"])
def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("revq.data.atomic._exchange_in_one_step", lambda new, target: False)
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "out", frozenset({"a"})) as folder:
            (folder / "a").write_text(text)
        assert (tmp_path / "out" / "a").read_text() == text
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", frozenset({"a"})) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_write_leaves_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "out", frozenset({"a"})) as folder:
        (folder / "a").write_text("old")
    script = f"""
        import os, signal
        from revq.data.atomic import atomic_folder
        with atomic_folder({str(tmp_path / "out")!r}, frozenset({{"a"}})) as folder:
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "a").read_text() == "old"
    with atomic_folder(tmp_path / "out", frozenset({"a"})) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refuses(folder, *words):
    with pytest.raises(InputError) as caught:
        ReVQ.from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files_are_named(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere", "found nothing")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", "found a file")
    refuses(tmp_path, str(tmp_path), "config.json", "missing")
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    refuses(tmp_path / "model", "model.safetensors", "missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", ["JSON"]),
        ("[1]", ["object", "list"]),
        ({"num_code": 3}, ["num_code"]),
        ({"num_tokens": 7}, ["num_tokens", "divisor", "7"]),
        ({"num_codes": "many"}, ["num_codes", "'many'"]),
        ({"num_codes": 1.5}, ["num_codes: expected an integer, got 1.5"]),
        ({"split": "diagonal"}, ["split", "diagonal"]),
        ({"latent_shape": 5}, ["int"]),
        ({"rectifier": {"kind": "vit"}}, ["rectifier kind", "vit"]),
    ],
    ids=str,
)
def test_damaged_configurations_are_named(tmp_path, change, words):
    tiny_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    refuses(tmp_path / "model", str(path), *words)


def test_damaged_weights_are_named(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole, state = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(whole[:-100])
    refuses(tmp_path / "model", str(path), "safetensors")
    path.write_bytes(b"")
    refuses(tmp_path / "model", str(path), "safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != "normalizer.std"}, path)
    refuses(tmp_path / "model", str(path), "normalizer.std", "missing")
    save_file(state | {"quantizer.codebook": state["quantizer.codebook"][:, :5].contiguous()}, path)
    refuses(tmp_path / "model", str(path), "quantizer.codebook", "[32, 12, 4]", "[32, 5, 4]")
    save_file(state | {"rectifier.extra": torch.zeros(1)}, path)
    refuses(tmp_path / "model", str(path), "rectifier.extra")


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    loaded, path = ReVQ.from_pretrained(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)


def test_half_precision_files_load_as_float32(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}, path)
    loaded = ReVQ.from_pretrained(tmp_path / "model")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook.half().float())


def test_a_hub_id_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses("nobody-at-all/no-such-model", "nobody-at-all/no-such-model", "config.json", "hub")
