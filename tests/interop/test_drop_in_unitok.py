"""A re-implementation of UniTok's quantizers: several codebooks of unit vectors, a record of usage."""

import pytest
import torch
from drop_in_case import Call, check_memory, check_quantizer, graph_breaks, patched
from torch import nn
from torch.nn import functional as F

import revq
from revq_kernels.interop.families import autoregressive
from tests.third_party_quantizers import process_group
from tests.third_party_quantizers.unitok import VectorQuantizer, VectorQuantizerM


def build(entropy_loss=False):
    torch.manual_seed(0)
    return VectorQuantizerM(1024, 16, use_entropy_loss=entropy_loss, num_codebooks=2)


def inputs(seed):
    return (torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize("entropy_loss", [False, True])
def test_unitok(entropy_loss):
    check_quantizer(lambda: build(entropy_loss), inputs)


def test_indices():
    corrected = check_quantizer(build, inputs, method="f_to_idx", steps=0)
    assert corrected > 0, "bfloat16 autocast makes the original choose wrong codes"


def test_one_codebook():
    check_quantizer(lambda: build().codebooks[0], lambda seed: (inputs(seed)[0][..., :8],), steps=0)


def test_a_tokenizer_encodes_and_decodes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), build()).eval()
    patches = torch.randn(2, 64, 24)
    features = model[0](patches)
    expected, _, _, usage = model(patches)
    indices = model[1].f_to_idx(features)
    with patched(model, verify=True) as report:
        assert [entry.family for entry in report.entries] == ["UniTok"] * 2
        found, _, _, same = model(patches)
        assert torch.equal(model[1].f_to_idx(features), indices) and torch.equal(found, expected) and same == usage
        torch.testing.assert_close(model[1].idx_to_f(indices), found)


def test_zero_vectors_take_the_first_code():
    module, features = build().eval(), torch.zeros(1, 3, 16)
    assert not module.f_to_idx(features).any()
    with patched(module):
        assert not module.f_to_idx(features).any()


def test_the_record_counts_its_steps(monkeypatch):
    original, fast = build(), build()
    for module in (original, fast):
        for part in module.codebooks:
            part.vocab_usage_record_times = 99
    with patched(fast):
        for seed in range(3):  # the weights change at 100
            original(*inputs(seed)), fast(*inputs(seed))
    for left, right in zip(original.codebooks, fast.codebooks, strict=True):
        assert left.vocab_usage_record_times == right.vocab_usage_record_times == 102
        assert torch.equal(left.vocab_usage, right.vocab_usage)


def test_sums_over_processes_if_the_repository_does(monkeypatch):
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda share, *args, **kwargs: summed.append(share.clone()))
    module = build()
    with patched(module):
        module.train()(*inputs(0))
        monkeypatch.setattr(process_group, "initialized", lambda: True)
        module.eval()(*inputs(0))
        assert not summed
        module.train()(*inputs(0))
    assert [int(share.sum()) for share in summed] == [128, 128]


def test_no_matrix(monkeypatch):
    monkeypatch.setattr(autoregressive, "_CPU_PAIRS", 4 * 512)
    check_memory(build(entropy_loss=True), Call("forward", inputs(0)), pairs=128 * 512)
    check_memory(build(), Call("f_to_idx", inputs(0)), pairs=128 * 512)


def test_no_new_graph_break():
    module, call = build(entropy_loss=True).train(), Call("forward", inputs(0))
    before = graph_breaks(module, call)
    with patched(module):
        assert graph_breaks(module, call) <= before


class OtherNorm(VectorQuantizer):
    def f_to_idx(self, features):
        return (features @ self.codebook.weight.T).argmax(-1)


class OtherTable(VectorQuantizer):
    def __init__(self, vocab_size, vocab_width):
        super().__init__(vocab_size, vocab_width)
        self.codebook = nn.Embedding(vocab_size, vocab_width)

    def forward(self, features):
        return self.codebook(F.normalize(features, dim=-1) @ self.codebook.weight.T.argmax(1))


class ZeroCode(VectorQuantizer):
    def __init__(self, vocab_size, vocab_width):
        super().__init__(vocab_size, vocab_width)
        self.codebook.weight.data[3] = 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherNorm, "f_to_idx in evaluation mode"),
        (OtherTable, "revq.fast_distances()"),
        (ZeroCode, "a code is 0"),
    ],
)
def test_a_changed_class_is_left(kind, reason):
    kind = type("VectorQuantizer", (kind,), {})
    module = kind(512, 8)
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and type(module) is kind and reason in entry.note
