"""diffusers' VectorQuantizer, unmodified, alone and in VQModel and PaellaVQModel."""

import numpy as np
import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, patched
from embedding_case import CODES, DIM, PIXELS, as_if, check_compile, images, note_of, trained

pytest.importorskip("diffusers", reason="the unmodified package is the reference here")
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQModel

USED = torch.randperm(CODES - 32, generator=torch.Generator().manual_seed(1))[:400]


def build(**options):
    return trained(VectorQuantizer(CODES, DIM, 0.3, **options))


@pytest.fixture
def used(tmp_path):
    np.save(tmp_path / "used.npy", torch.cat([USED, USED[:5]]).numpy())  # among equal entries the first counts
    return str(tmp_path / "used.npy")


@pytest.mark.parametrize("legacy", [True, False])
def test_alone(legacy):
    # autocast runs torch.cdist in float32
    assert check_quantizer(lambda: build(legacy=legacy, sane_index_shape=not legacy), images) == 0


@pytest.mark.parametrize("unknown", ["random", "extra", 7])
@pytest.mark.parametrize("sane", [True, False])
def test_remapped(used, unknown, sane):
    check_quantizer(lambda: build(remap=used, unknown_index=unknown, sane_index_shape=sane), images, steps=2)


def test_no_matrix_and_no_new_graph_break(used):
    call = Call("forward", images(0))
    check_memory(build(), call, pairs=PIXELS * CODES)
    check_compile(build(), call)
    check_memory(build(remap=used), call, pairs=PIXELS * USED.numel())
    check_compile(build(remap=used, unknown_index="extra"), call)


def test_autocast_of_a_bfloat16_input():
    module = build()
    (x,) = images(0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x.bfloat16())
        with patched(module):
            found = module(x.bfloat16())
    assert found[0].dtype == expected[0].dtype and torch.equal(found[0], expected[0])


@torch.no_grad()
def test_vq_model():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = VQModel(**blocks, block_out_channels=(32, 32), num_vq_embeddings=CODES, latent_channels=4).eval()
    trained(model.quantize)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with patched(model, verify=True) as report:
        assert [entry.module for entry in report.entries] == ["quantize"]
        found = model(x)
        decoded = model.decode(model.encode(x).latents)
    for result in (found, decoded):
        assert torch.equal(result.sample, expected.sample) and torch.equal(result.commit_loss, expected.commit_loss)


@torch.no_grad()
def test_paella_vq_model():
    paella = pytest.importorskip("diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model")
    torch.manual_seed(0)
    model = paella.PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=CODES).eval()
    trained(model.vquantizer)
    latents = model.encode(torch.randn(2, 3, 16, 16)).latents
    expected = model.decode(latents, force_not_quantize=False).sample
    with patched(model):
        assert torch.equal(model.decode(latents, force_not_quantize=False).sample, expected)


def test_a_changed_version_is_left():
    def other_side(self, z):
        self.legacy = not self.legacy
        results = VectorQuantizer.forward(self, z)
        self.legacy = not self.legacy
        return results

    assert "gradients: arguments[0][0] is off" in note_of(
        trained(as_if(VectorQuantizer, forward=other_side)(CODES, DIM, 0.3))
    )
    wider = build()
    wider.vq_embed_dim = 2 * DIM
    assert f"expected ({CODES}, {2 * DIM})" in note_of(wider)
    sided = build()
    sided.legacy = "new"
    assert "legacy='new'" in note_of(sided)
