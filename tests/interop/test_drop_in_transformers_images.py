"""transformers' Chameleon, Janus, GLM-Image and Emu3 image quantizers, unmodified."""

from types import SimpleNamespace

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, patched
from embedding_case import CODES, DIM, PIXELS, as_if, check_compile, images, note_of, trained

import revq

pytest.importorskip("transformers", reason="the unmodified package is the reference here")
from transformers.models.chameleon import modeling_chameleon
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.emu3 import modeling_emu3
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.glm_image import modeling_glm_image
from transformers.models.glm_image.configuration_glm_image import GlmImageVQVAEConfig
from transformers.models.janus import modeling_janus
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

CHAMELEON = modeling_chameleon.ChameleonVQVAEVectorQuantizer
GLM_IMAGE = modeling_glm_image.GlmImageVQVAEVectorQuantizer
EMU3 = modeling_emu3.Emu3VQVAEVectorQuantizer
WITH_LOSS = (CHAMELEON, modeling_janus.JanusVQVAEVectorQuantizer, GLM_IMAGE)


def build(kind=CHAMELEON):
    sizes = {"num_embeddings": CODES, "codebook_size": CODES, "embed_dim": DIM, "num_patches": 4}
    return trained(kind(SimpleNamespace(**sizes, beta=0.3)))


def videos(seed):
    return (torch.randn(2, 2, DIM, 4, 4, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize("kind", WITH_LOSS)
def test_with_loss(kind):
    assert check_quantizer(lambda: build(kind), images) > 0, "bfloat16 autocast makes the original choose wrong codes"


def test_emu3():
    assert check_quantizer(lambda: build(EMU3), videos, steps=0) > 0  # returns indices only, so nothing trains


@pytest.mark.parametrize("kind", [*WITH_LOSS, EMU3])
def test_no_matrix_and_no_new_graph_break(kind):
    call = Call("forward", videos(0) if kind is EMU3 else images(0))
    check_memory(build(kind), call, pairs=PIXELS * CODES)
    check_compile(build(kind), call)


@pytest.mark.parametrize("kind", [*WITH_LOSS, EMU3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass_the_check(kind, dtype):
    patched(build(kind).to(dtype), verify=True)


TOWER = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}


def chameleon_model():
    config = ChameleonVQVAEConfig(embed_dim=DIM, num_embeddings=CODES, resolution=16, **TOWER)
    return modeling_chameleon.ChameleonVQVAE(config), lambda model, x: model.encode(x)


def janus_model():
    config = JanusVQVAEConfig(embed_dim=DIM, num_embeddings=CODES, num_patches=8, **TOWER)
    return modeling_janus.JanusVQVAE(config), lambda model, x: (model.encode(x), model(x))


def glm_image_model():
    config = GlmImageVQVAEConfig(embed_dim=DIM, num_embeddings=CODES, latent_channels=3)
    return modeling_glm_image.GlmImageVQVAE(config), lambda model, x: model.encode(x)


def emu3_model():
    sizes = {"temporal_downsample_factor": 2, "attn_resolutions": [], "hidden_size": 64, "num_attention_heads": 1}
    tower = {**TOWER, "latent_channels": 4, "channel_multiplier": [1, 2]}
    config = Emu3VQVAEConfig(codebook_size=CODES, embed_dim=4, **sizes, **tower)

    def use(model, x):
        tokens = model.encode(x, image_sizes=torch.tensor([[16, 16]] * len(x))).image_tokens
        return tokens, model.decode(torch.stack(tokens))

    return modeling_emu3.Emu3VQVAE(config), use


@pytest.mark.parametrize("make", [chameleon_model, janus_model, glm_image_model, emu3_model])
@torch.no_grad()
def test_whole_model(make):
    torch.manual_seed(0)
    model, use = make()
    trained(model.eval().quantize)
    x = torch.randn(2, 3, 16, 16)
    expected = torch.utils._pytree.tree_leaves(use(model, x))
    with patched(model, verify=True) as report:
        assert [entry.module for entry in report.entries] == ["quantize"]
        found = torch.utils._pytree.tree_leaves(use(model, x))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_a_changed_version_is_left():
    def other_beta(self, hidden_state):
        quantized, loss, indices = CHAMELEON.forward(self, hidden_state)
        return quantized, loss * 1.001, indices

    def other_parameter(self, hidden_state, mask=None):
        return EMU3.forward(self, hidden_state)

    def not_normalized(self, hidden_state):
        return CHAMELEON.forward(self, hidden_state)

    assert "result[1] is off" in note_of(build(as_if(CHAMELEON, forward=other_beta)))
    assert "takes (hidden_state, mask)" in note_of(build(as_if(EMU3, forward=other_parameter)))
    assert "differ" in note_of(build(as_if(GLM_IMAGE, forward=not_normalized)))
    renamed = build(EMU3)
    renamed.codebook = renamed._modules.pop("embedding")
    assert "no attribute 'embedding'" in note_of(renamed)
    with pytest.raises(ValueError, match="no attribute 'embedding'"):
        revq.like(renamed)
