"""taming's VectorQuantizer2, IBQ's, and SimVQ, restated in tests/third_party_quantizers."""

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, patched
from embedding_case import CODES, DIM, PIXELS, as_if, check_compile, images, note_of, trained
from torch import nn

from revq_kernels.interop.registry import LEFT_ALONE
from tests.third_party_quantizers import ibq, simvq, taming

USED = torch.randperm(CODES - 32, generator=torch.Generator().manual_seed(1))[:400]
USED = torch.cat([USED, USED[:5]])  # among equal entries the first counts


def build(kind=taming.VectorQuantizer2, **options):
    return trained(kind(CODES, DIM, 0.3, **options))


def sequences(seed):
    return (images(seed)[0].flatten(2),)


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"sane_index_shape": True}])
def test_taming(options):
    assert check_quantizer(lambda: build(**options), images) > 0, "autocast makes the original choose wrong codes"


@pytest.mark.parametrize("unknown", ["random", "extra", 7])
@pytest.mark.parametrize("kind", [taming.VectorQuantizer2, simvq.SimVQ])
def test_remapped(kind, unknown):
    check_quantizer(lambda: build(kind, remap=USED, unknown_index=unknown), images, steps=2)


def test_remapped_indices_map_back():
    module = build(remap=USED, unknown_index="extra", sane_index_shape=True)
    whole = build(sane_index_shape=True)
    indices = whole(*images(0))[2][2]
    known = torch.isin(indices, USED)
    assert 0 < known.sum() < known.numel()
    with patched(module):
        mapped = module(*images(0))[2][2]
        assert torch.equal(module.unmap_to_all(mapped)[known], indices[known])
        assert (mapped[~known] == len(USED)).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_ibq(normalized):
    assert check_quantizer(lambda: build(ibq.VectorQuantizer2, l2_normalize=normalized), images) > 0


@pytest.mark.parametrize("kind, inputs", [(simvq.SimVQ, images), (simvq.SimVQ1D, sequences)])
@pytest.mark.parametrize("legacy", [True, False])
def test_simvq(kind, inputs, legacy):
    check_quantizer(lambda: build(kind, legacy=legacy), inputs)


@torch.no_grad()
def test_simvq_under_autocast():
    module, x = build(simvq.SimVQ), torch.randn(2, DIM, 16, 16).bfloat16()
    right = module(x.float())[0][2]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x)[0][2]
        with patched(module):
            (quantized, _, indices), breakdown = module(x)
    assert torch.equal(indices, right) and not torch.equal(rounded, right), "the original's codes are rounded"
    assert quantized.dtype == torch.bfloat16 and type(breakdown) is simvq.LossBreakdown


@pytest.mark.parametrize(
    "module, inputs",
    [
        (build(), images),
        (build(ibq.VectorQuantizer2, l2_normalize=True), images),
        (build(simvq.SimVQ), images),
        (build(simvq.SimVQ1D), sequences),
    ],
)
def test_no_matrix_and_no_new_graph_break(module, inputs):
    call = Call("forward", inputs(0))
    check_memory(module, call, pairs=PIXELS * CODES)
    check_compile(module, call)


def test_arguments_for_other_quantizers_are_refused():
    for module in (build(), build(simvq.SimVQ)):
        with patched(module):
            module(*images(0), temp=1.0)
            for wrong in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
                with pytest.raises(AssertionError):
                    module(*images(0), **wrong)


def test_what_is_left():
    def scaled(self, z, temp=None, rescale_logits=False, return_logits=False):
        quantized, loss, info = taming.VectorQuantizer2.forward(self, z)
        return quantized, 2 * loss, info

    def projected(self, z, temp=None, rescale_logits=False, return_logits=False, mask=None):
        return simvq.SimVQ.forward(self, z)

    assert "result[1] is off" in note_of(build(as_if(taming.VectorQuantizer2, forward=scaled)))
    assert "return_logits, mask)" in note_of(build(as_if(simvq.SimVQ, forward=projected)))
    assert "one-hot matrix" in note_of(build(taming.VectorQuantizer))
    assert "IndexError" in note_of(build(simvq.SimVQ1D, sane_index_shape=True))  # the original fails as well
    wide = build(simvq.SimVQ)
    wide.embedding_proj = nn.Linear(DIM, 2 * DIM)
    assert f"({2 * DIM}, {DIM})" in note_of(wide)
    for name in ("IndexPropagationQuantize", "GumbelQuantize", "VectorQuantizerSinkhorn"):
        assert note_of(type(name, (nn.Embedding,), {})(4, 4)) == LEFT_ALONE[name]
