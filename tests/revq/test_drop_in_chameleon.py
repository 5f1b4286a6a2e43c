"""transformers' Chameleon, Janus and GLM-Image quantizers, unmodified."""

from types import SimpleNamespace

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, graph_breaks, patched

pytest.importorskip("transformers", reason="the unmodified package is the reference here")
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer


def build():
    torch.manual_seed(0)
    return ChameleonVQVAEVectorQuantizer(SimpleNamespace(num_embeddings=512, embed_dim=8, beta=0.25))


def inputs(seed):
    return (torch.randn(2, 8, 4, 8, generator=torch.Generator().manual_seed(seed)),)


def test_chameleon():
    assert check_quantizer(build, inputs) > 0, "bfloat16 autocast makes the original choose wrong codes"


def test_no_matrix():
    check_memory(build(), Call("forward", inputs(0)), pairs=64 * 512)


def test_no_new_graph_break():
    module = build()
    call = Call("forward", inputs(0))
    before = graph_breaks(module, call)
    with patched(module):
        assert graph_breaks(module, call) <= before
