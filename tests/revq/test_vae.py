"""Frozen VAEs: three classes, raw latents, and a one-line message for each bad folder."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vae import save_tiny_vae

from revq.assets import vae_folder
from revq.data.vae import CLASSES, FrozenVAE, load_vae
from revq.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make(class_name):
    """A diffusers autoencoder of a few thousand random weights."""
    import diffusers

    if class_name == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=5,
            scaling_factor=0.37,
            shift_factor=0.21,
        )
    if class_name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=5,
            scaling_factor=0.37,
            shift_factor=0.21,
        )
    return diffusers.AutoencoderDC(
        latent_channels=5,
        encoder_block_out_channels=(10, 20, 20),
        decoder_block_out_channels=(10, 20, 20),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.37,
    )


def raw(vae, images):
    """Latents and reconstruction by diffusers alone, with neither scaling_factor nor shift_factor."""
    with torch.no_grad():
        out = vae.encode(images)
        z = (
            out.latent_dist.mode()
            if hasattr(out, "latent_dist")
            else getattr(out, "latent", getattr(out, "latents", None))
        )
        return z, vae.decode(z).sample.clamp(-1, 1)


@pytest.mark.parametrize("class_name", ["AutoencoderDC", "AutoencoderKL", "AutoencoderTiny"])
def test_latents_are_raw_and_decode_takes_them(tmp_path, class_name):
    original = make(class_name).eval()
    original.save_pretrained(tmp_path / "vae")
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    z, reconstruction = raw(original, images)

    vae = load_vae(tmp_path / "vae")
    assert (vae.class_name, vae.downscale, vae.latent_channels) == (class_name, 4, 5)
    assert vae.name == str(tmp_path / "vae")
    assert z.shape == (2, 5, 8, 6)
    assert vae.latent_shape(32) == (5, 8, 8)
    assert torch.equal(vae.encode(images), z)
    assert torch.equal(vae.decode(z), reconstruction)
    assert reconstruction.abs().max() <= 1
    assert torch.equal(vae.decode(z * 1e4).abs().max(), torch.tensor(1.0))


def test_the_vae_is_frozen(tmp_path):
    vae = load_vae(save_tiny_vae(tmp_path / "vae"))
    assert not vae.vae.training
    assert not any(parameter.requires_grad for parameter in vae.vae.parameters())
    z = vae.encode(torch.zeros(1, 3, 32, 32).requires_grad_())
    assert not z.requires_grad
    assert not vae.decode(z.requires_grad_()).requires_grad


def test_half_precision_files_become_float32(tmp_path):
    folder = save_tiny_vae(tmp_path / "vae")
    state = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    vae = load_vae(folder)
    assert {tensor.dtype for tensor in vae.vae.state_dict().values()} == {torch.float32}
    assert all(torch.equal(vae.vae.state_dict()[name], tensor.float()) for name, tensor in state.items())
    assert vae.encode(torch.zeros(1, 3, 32, 32).half()).dtype == torch.float32


def test_the_fingerprint_is_of_the_weights_not_of_the_file(tmp_path):
    folder = save_tiny_vae(tmp_path / "vae")
    first = load_vae(folder).fingerprint
    assert len(first) == 64
    load_vae(folder).vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert load_vae(tmp_path / "bin").fingerprint == first
    state = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    next(iter(state.values())).view(-1)[0] += 1e-3
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert load_vae(folder).fingerprint != first
    assert load_vae(save_tiny_vae(tmp_path / "other", seed=1)).fingerprint != first


def test_unusable_images_latents_and_sizes_are_refused(tmp_path):
    vae = load_vae(save_tiny_vae(tmp_path / "vae"))
    with pytest.raises(InputError, match=r"multiples of 4, got \(30, 32\)"):
        vae.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(InputError, match=r"expected float \[B, 3, H, W\], got torch.uint8"):
        vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"expected float \[B, 4, h, w\], got torch.float32 \(1, 5, 8, 8\)"):
        vae.decode(torch.zeros(1, 5, 8, 8))
    for size in (33, 0, -4):
        with pytest.raises(InputError, match=f"image_size: expected a multiple of the VAE's 4, got {size}"):
            vae.latent_shape(size)


def refuses(name, *words):
    with pytest.raises(InputError) as caught:
        load_vae(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_are_named(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere", "VAE folder", "found nothing")
    refuses("./nowhere/at-all", "found nothing")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", "found a file")
    refuses(tmp_path, str(tmp_path), "config.json")
    save_tiny_vae(tmp_path / "pipeline" / "vae")
    refuses(tmp_path / "pipeline", "config.json", f"try {tmp_path / 'pipeline' / 'vae'}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["config.json", "not valid JSON"]),
        ("[]", ["config.json", "expected a JSON object"]),
        ("{}", ["config.json", "_class_name"]),
        ('{"_class_name": "UNet2DModel"}', ["AutoencoderDC, AutoencoderKL, AutoencoderTiny", "UNet2DModel"]),
        ('{"_class_name": "AutoencoderDC", "latent_channels": "x"}', ["cannot load this AutoencoderDC"]),
    ],
)
def test_damaged_configurations_are_named(tmp_path, text, words):
    folder = save_tiny_vae(tmp_path / "vae")
    (folder / "config.json").write_text(text)
    refuses(folder, str(folder), *words)


def test_damaged_weights_are_named(tmp_path):
    folder = save_tiny_vae(tmp_path / "vae")
    path = folder / WEIGHTS
    whole, state = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(whole[: len(whole) // 2])
    refuses(folder, str(folder), "cannot load this AutoencoderDC")
    path.unlink()
    refuses(folder, str(folder), "expected the VAE's weights", WEIGHTS)
    save_file({n: t for n, t in state.items() if n != "decoder.conv_in.weight"}, path, metadata={"format": "pt"})
    refuses(folder, str(folder), "lack 1 tensors", "decoder.conv_in.weight")
    save_file(state | {"decoder.conv_in.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    refuses(folder, str(folder), "cannot load this AutoencoderDC")


def save_as(folder, name, tensors):
    (folder / WEIGHTS).unlink(missing_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor * float("nan"),
        lambda tensor: tensor / 0,
        lambda tensor: tensor.double() + 1e300,  # infinite in float32
        lambda tensor: tensor.int(),
        lambda tensor: tensor[None],
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
def test_weights_of_wrong_values_or_shapes_are_named(tmp_path, change, name):
    folder = save_tiny_vae(tmp_path / "vae")
    state = load_file(folder / WEIGHTS)
    save_as(folder, name, state | {"decoder.conv_in.bias": change(state["decoder.conv_in.bias"])})
    refuses(folder, str(folder), "decoder.conv_in.bias")


class Call:
    """A pickled call of a function that no weights need."""

    def __reduce__(self):
        return (print, ("called",))


def test_pickled_weights_cannot_call_or_expand(tmp_path, capsys, monkeypatch):
    folder = save_tiny_vae(tmp_path / "vae")
    state = load_file(folder / WEIGHTS)
    save_as(folder, "diffusion_pytorch_model.bin", state | {"x": Call()})
    refuses(folder, str(folder), "cannot load")
    assert capsys.readouterr().out == ""
    # One stored number that stands for 10**12.
    save_as(folder, "diffusion_pytorch_model.bin", {name: t.view(-1)[:1].expand(10**12) for name, t in state.items()})
    refuses(folder, str(folder), "1000000000000")
    seen = []
    load = torch.load
    monkeypatch.setattr("torch.load", lambda *args, **options: seen.append(options) or load(*args, **options))
    save_as(folder, "diffusion_pytorch_model.bin", state)
    load_vae(folder)
    assert seen[0]["weights_only"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_layers_per_block": [10**9, 1, 1]},
        {"encoder_block_out_channels": [10**6] * 3},
        {"encoder_block_out_channels": [2**40] * 3},
        {"latent_channels": -4},
        {"latent_channels": 4.5},
        {"encoder_block_out_channels": None},
        {"encoder_block_out_channels": "abc"},
        {"encoder_block_types": "Nope"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"_class_name": ["AutoencoderDC"]},
        {"_class_name": "AutoencoderKL", "layers_per_block": 10**9},
    ],
)
def test_configurations_of_another_vae_are_refused_without_building_it(tmp_path, change):
    folder = save_tiny_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(folder, str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_a_module_is_used_itself(tmp_path):
    for class_name in CLASSES:
        module = make(class_name).half()
        vae = load_vae(module)
        assert vae.vae is module
        assert (vae.name, vae.class_name, module.training) == (class_name, class_name, False)
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
        assert load_vae(vae) is vae
    import diffusers

    folder = save_tiny_vae(tmp_path / "vae")
    assert load_vae(diffusers.AutoencoderDC.from_pretrained(folder)).name == str(folder)
    refuses(torch.nn.Linear(2, 2), "AutoencoderDC, AutoencoderKL, AutoencoderTiny", "got Linear")
    refuses(make("AutoencoderTiny").to("meta"), "meta device")
    refuses(None, "NoneType")
    refuses("a\0b", "found nothing")
    refuses("x" * 5000, "too long")
    with pytest.raises(InputError, match="revision"):
        load_vae(module, revision="main")


@pytest.mark.parametrize("variant", ["fp16.safetensors", "bf16.safetensors", "fp16.bin", "bin", "sharded"])
def test_variants_of_the_weights_load(tmp_path, variant):
    folder = save_tiny_vae(tmp_path / "pipeline" / "vae")
    state = load_file(folder / WEIGHTS)
    dtype = torch.float16 if "fp16" in variant else torch.bfloat16 if "bf16" in variant else torch.float32
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    if variant == "sharded":
        places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
        for part in set(places.values()):
            save_as(folder, part, {name: state[name] for name in state if places[name] == part})
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_as(folder, f"diffusion_pytorch_model.{variant}", stored)
    loaded = load_vae(folder).vae.state_dict()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in state)


def test_names_of_old_diffusers_versions_load(tmp_path):
    make("AutoencoderKL").save_pretrained(tmp_path)
    first, state = load_vae(tmp_path).fingerprint, load_file(tmp_path / WEIGHTS)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, once in new.items():
        state = {name.replace(now, once): tensor for name, tensor in state.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_as(tmp_path, WEIGHTS, state)
    assert load_vae(tmp_path).fingerprint == first


def test_another_default_dtype_changes_nothing(tmp_path):
    folder, images = save_tiny_vae(tmp_path / "vae"), torch.rand(1, 3, 32, 32) * 2 - 1
    first = load_vae(folder)
    z = first.encode(images)
    torch.set_default_dtype(torch.float64)
    try:
        vae = load_vae(folder)
        assert torch.equal(vae.encode(images), z)
        assert vae.decode(z).dtype == torch.float32
        assert vae.fingerprint == first.fingerprint
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("subfolder", ["", "vae", "deep/er"])
@pytest.mark.parametrize("weights", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"])
def test_hub_names_have_subfolders_and_revisions(tmp_path, monkeypatch, subfolder, weights):
    folder = save_tiny_vae(tmp_path / "cache" / subfolder)
    save_as(folder, weights, load_file(folder / WEIGHTS))
    asked = []

    def download(repository, filename, *, revision=None):
        asked.append((repository, revision))
        path = tmp_path / "cache" / filename
        if not path.is_file():
            raise FileNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = f"someone/model/{subfolder}".rstrip("/")
    for given, revision, whole in (
        (name, None, name),
        (f"{name}@v1.0", None, f"{name}@v1.0"),
        (name, "refs/pr/1", f"{name}@refs/pr/1"),
        (f"{name}@abc", "abc", f"{name}@abc"),
    ):
        asked.clear()
        vae = load_vae(given, revision=revision)
        assert vae.name == whole
        assert set(asked) == {("someone/model", whole.partition("@")[2] or None)}
        assert load_vae(vae.name).fingerprint == vae.fingerprint
    with pytest.raises(InputError, match="revision"):
        load_vae(f"{name}@a", revision="b")
    for bad in (f"{name}/../x", f"{name}@", f"{name}@a@b", "someone"):
        refuses(bad, bad)


def test_a_vae_of_other_channels_is_refused(tmp_path):
    vae = make("AutoencoderTiny")
    vae.register_to_config(in_channels=1)
    with pytest.raises(InputError, match="RGB images"):
        FrozenVAE(vae, "gray")


def test_a_hub_id_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses("nobody-at-all/no-such-vae", "nobody-at-all/no-such-vae", "no such folder here", "hub id")


def test_the_embedded_vae_has_the_papers_geometry():
    vae = load_vae()
    assert (vae.name, vae.class_name) == ("embedded", "AutoencoderDC")
    assert vae.latent_shape(128) == (32, 8, 8)
    assert json.loads((vae_folder() / "config.json").read_text())["_class_name"] == "AutoencoderDC"
    images = torch.linspace(-0.5, 0.5, 128).expand(1, 3, 128, 128)
    latents = vae.encode(images)
    assert latents.shape == (1, 32, 8, 8)
    assert (vae.decode(latents) - images).square().mean() < 0.02, "it reconstructs a plain gradient"
