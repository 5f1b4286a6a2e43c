"""A re-implementation of LlamaGen's quantizer, with its entropy loss."""

import copy

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, graph_breaks, patched
from torch import nn

import revq
from revq_kernels.interop.families import autoregressive
from tests.third_party_quantizers.llamagen import VectorQuantizer


def build(ratio=0.0, l2_norm=True, show_usage=True):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, 8, 0.25, ratio, l2_norm, show_usage)
    if not l2_norm:
        nn.init.normal_(quantizer.embedding.weight, std=0.3)
    if show_usage:
        quantizer.codebook_used.requires_grad_(False)  # as released, the original raises in training on a CPU
    return quantizer


def inputs(seed):
    return (torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(seed)) * 0.3,)


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_llamagen(ratio, l2_norm):
    corrected = check_quantizer(lambda: build(ratio, l2_norm, l2_norm), inputs)
    assert corrected > 0, "bfloat16 autocast makes the original choose wrong codes"


def test_narrow_features_under_autocast():
    z = inputs(0)[0].bfloat16()
    original, fast = build(0.1).train(), build(0.1).train()
    with patched(fast), torch.autocast("cpu", torch.bfloat16):
        expected, found = original(z), fast(z)
    for right, value in zip(expected[1][:3], found[1][:3], strict=True):
        assert value.dtype == right.dtype
        torch.testing.assert_close(value, right, rtol=1e-2, atol=1e-2)
    assert found[0].dtype == expected[0].dtype


def test_losses_and_usage_that_are_not_tensors():
    original, fast = build().train(), build().train()
    with patched(fast):
        for seed in range(3):
            expected, found = original(*inputs(seed))[1], fast(*inputs(seed))[1]
            assert found[3] == expected[3] > 0
        assert fast.eval()(*inputs(0))[1] == original.eval()(*inputs(0))[1] == (None, None, None, 0)


def test_no_matrix(monkeypatch):
    monkeypatch.setattr(autoregressive, "_CPU_PAIRS", 4 * 512)
    for ratio in (0.0, 0.1):
        check_memory(build(ratio, show_usage=False), Call("forward", inputs(0)), pairs=256 * 512)


def test_record_of_used_codes_as_released():
    """The record is a parameter: the original raises in training, and after a move to another device it cannot be copied."""
    leaf = build()
    leaf.codebook_used.requires_grad_(True)
    moved = copy.deepcopy(leaf)
    moved.codebook_used = moved.codebook_used * 1
    with pytest.raises(RuntimeError, match="leaf"):
        copy.deepcopy(leaf).train()(*inputs(0))
    expected = build().train()
    expected(*inputs(0))
    for module in (leaf, moved):
        used = module.codebook_used
        with patched(module):
            module.train()(*inputs(0))
        assert module.codebook_used is used and torch.equal(used, expected.codebook_used)


def test_no_new_graph_break():
    for training in (False, True):
        module, call = build(0.1).train(training), Call("forward", inputs(0))
        before = graph_breaks(module, call)
        with patched(module):
            assert graph_breaks(module, call) <= before


def test_a_whole_tokenizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), build()).eval()
    images = torch.randn(2, 3, 16, 16)
    expected, _, (_, _, indices) = model(images)
    with patched(model):
        found, _, (_, _, same) = model(images)
        codes = model[1].get_codebook_entry(same, (2, 8, 4, 4))
    assert torch.equal(same, indices) and torch.equal(found, expected)
    torch.testing.assert_close(codes, found)


class OtherBeta(VectorQuantizer):
    def forward(self, z):
        quantized, (codebook, commitment, *rest), info = super().forward(z)
        if self.training:
            codebook, commitment = self.beta * codebook, commitment / self.beta
        return quantized, (codebook, commitment, *rest), info


class OtherEntropy(VectorQuantizer):
    def forward(self, z):
        quantized, (codebook, commitment, entropies, usage), info = super().forward(z)
        return quantized, (codebook, commitment, entropies and 2 * entropies, usage), info


class OtherNorm(VectorQuantizer):
    def forward(self, z):
        return super().forward(2 * z)


class OtherParameters(VectorQuantizer):
    def forward(self, z, mask=None):
        return super().forward(z)


class Grouped(VectorQuantizer):
    groups = 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherBeta, "forward in training mode"),
        (OtherEntropy, "forward in training mode"),
        (OtherNorm, "forward in evaluation mode"),
        (OtherParameters, "'forward' takes (z, mask); known is (z)"),
        (Grouped, "MGVQ's returns the one-hot matrix"),
    ],
)
def test_a_changed_class_is_left(kind, reason):
    kind = type("VectorQuantizer", (kind,), {})
    module = kind(512, 8, 0.25, 0.1, False, False)
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and type(module) is kind and f"no LlamaGen: {reason}" in entry.note
