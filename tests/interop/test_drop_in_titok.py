"""The quantizers of TiTok, MaskBit and MaskGIT's VQGAN, restated in tests/third_party_quantizers."""

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, patched
from embedding_case import CODES, DIM, PIXELS, as_if, check_compile, images, note_of, trained

from tests.third_party_quantizers import maskbit, maskgit_vqgan, titok

TITOK, MASKBIT, MASKGIT = titok.VectorQuantizer, maskbit.SimpleVectorizer, maskgit_vqgan.VectorQuantizer


def build(kind=TITOK, **options):
    return trained(kind(CODES, DIM, 0.3, **options))


@pytest.mark.parametrize("normalized", [True, False])
def test_titok(normalized):
    assert check_quantizer(lambda: build(use_l2_norm=normalized), images) > 0


@pytest.mark.parametrize("normalized", [True, False])
def test_titok_moves_unused_codes(normalized):
    check_quantizer(lambda: build(use_l2_norm=normalized, clustering_vq=True), images)


@pytest.mark.parametrize("normalized", [True, False])
def test_maskbit(normalized):
    assert check_quantizer(lambda: build(MASKBIT, use_l2_normalization=normalized), images) > 0


def test_maskbit_trains_with_its_own_entropy_loss():
    module = build(MASKBIT, entropy_loss_weight=0.1)
    with patched(module):
        assert module.train()(*images(0))[1]["entropy_loss"] != 0
        assert module.eval()(*images(0))[1]["entropy_loss"] == 0


def with_loss(seed):
    return (*images(seed), True)


def test_maskgit():
    assert check_quantizer(lambda: build(MASKGIT), with_loss) > 0
    assert check_quantizer(lambda: build(MASKGIT), images) > 0
    assert check_quantizer(lambda: build(MASKGIT), images, method="get_code", steps=0) > 0


@pytest.mark.parametrize(
    "module, call",
    [
        (build(), Call("forward", images(0))),
        (build(use_l2_norm=True), Call("forward", images(0))),
        (build(MASKBIT, use_l2_normalization=True), Call("forward", images(0))),
        (build(MASKGIT), Call("forward", with_loss(0))),
        (build(MASKGIT), Call("get_code", images(0))),
        (build(clustering_vq=True), Call("forward", images(0))),
    ],
)
def test_no_matrix_and_no_new_graph_break(module, call):
    check_memory(module, call, pairs=PIXELS * CODES)
    check_compile(module, call)


def test_dtype_under_autocast():
    module = build(MASKGIT)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(*images(0))
        with patched(module):
            found = module(*images(0))
    same = (found[1] == expected[1]).view(2, 1, 4, 8).expand_as(found[0])
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0][same], expected[0][same])


def test_several_processes_leave_clustering_to_the_original(monkeypatch):
    module = build(clustering_vq=True).train()
    with patched(module):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(TITOK, "forward", lambda self, z: "the original's")
        assert module(*images(0)) == "the original's"
        assert module.eval()(*images(0)) != "the original's"


def test_what_is_left():
    def both_sides(self, z):
        quantized, results = TITOK.forward(self, z)
        return quantized, {**results, "commitment_loss": results["codebook_loss"]}

    def farthest(self, z):
        return MASKBIT.forward(self, -z)

    def masked(self, hidden_states, return_loss=False, mask=None):
        return MASKGIT.forward(self, hidden_states, return_loss)

    assert "commitment_loss is off" in note_of(build(as_if(TITOK, forward=both_sides)))
    assert "64 of 64 differ" in note_of(build(as_if(MASKBIT, forward=farthest)))
    assert "return_loss, mask)" in note_of(build(as_if(MASKGIT, forward=masked)))
    halved = build(clustering_vq=True)
    halved.embed_prob = halved.embed_prob[: CODES // 2]
    assert f"embed_prob is ({CODES // 2},)" in note_of(halved)
