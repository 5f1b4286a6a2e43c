"""A re-implementation of VAR's multi-scale residual quantizer."""

import pytest
import torch
import torch.distributed as dist
from drop_in_case import (
    Call,
    check_call,
    check_memory,
    check_quantizer,
    check_state,
    check_training,
    graph_breaks,
    patched,
)
from torch import nn

import revq
from revq_kernels.interop.families import autoregressive
from tests.third_party_quantizers.var import VectorQuantizer2

SIDES = (1, 2, 3, 6)


@pytest.fixture
def group():
    """A process group of one process: the original's forward reads its size."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(znorm=False, share=4, resi=0.5, kind=VectorQuantizer2):
    torch.manual_seed(0)
    return kind(256, 8, znorm, v_patch_nums=SIDES, quant_resi=resi, share_quant_resi=share)


def inputs(seed):
    return (torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2,)


@pytest.mark.parametrize("znorm", [False, True])
def test_without_convolutions(znorm, group):
    """Also under autocast: without convolutions it affects the search only, so the codes of all scales can be checked."""
    check_quantizer(lambda: build(znorm, resi=0.0), inputs)
    corrected = check_quantizer(
        lambda: build(znorm, resi=0.0), lambda seed: (*inputs(seed), False), method="f_to_idxBl_or_fhat", steps=0
    )
    assert bool(corrected) == znorm, "bfloat16 autocast makes the original choose wrong codes, by inner products"


@pytest.mark.parametrize(("znorm", "share"), [(False, 4), (True, 4), (False, 1), (True, 0)])
def test_with_convolutions(znorm, share, group):
    module = build(znorm, share)
    for training in (False, True):
        check_call(module, Call("forward", inputs(1)), training=training)
        for to_fhat in (False, True):
            check_call(module, Call("f_to_idxBl_or_fhat", (*inputs(2), to_fhat)), training=training)
    check_training(module, "forward", inputs, steps=20 if share == 4 else 2)
    check_state(lambda: build(znorm, share), Call("forward", inputs(3)))


def test_other_sides_and_progressive_training(group):
    module, (features,) = build().eval(), inputs(0)
    sides = ((1, 1), (2, 4), (6, 6))
    expected = [module.f_to_idxBl_or_fhat(features, to_fhat, sides) for to_fhat in (False, True)]
    module.prog_si = 1
    expected.append(module.f_to_idxBl_or_fhat(features, True))
    with patched(module):
        found = [module.f_to_idxBl_or_fhat(features, True)]
        module.prog_si = -1
        found = [module.f_to_idxBl_or_fhat(features, to_fhat, sides) for to_fhat in (False, True)] + found
        with pytest.raises(AssertionError):
            module.f_to_idxBl_or_fhat(features, True, (1, 2))
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == len(theirs) and all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs, strict=True)
        )


def test_usages_and_the_record(group):
    original, fast = build().train(), build().train()
    for module in (original, fast):
        module.record_hit = 95  # the weights change at 100
    with patched(fast):
        for seed in range(3):
            assert fast(*inputs(seed), ret_usages=True)[1] == original(*inputs(seed), ret_usages=True)[1]
    assert fast.record_hit == original.record_hit == 95 + 3 * len(SIDES)
    torch.testing.assert_close(fast.ema_vocab_hit_SV, original.ema_vocab_hit_SV)


def test_without_a_process_group_only_the_indices_are_patched():
    module = build()
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        module(*inputs(0))
    expected = module.f_to_idxBl_or_fhat(*inputs(0), False)
    report = revq.patch(module, verbose=False)
    (entry,) = report.entries
    assert entry.patched and entry.family == "VAR (indices)" and entry.note.startswith("f_to_idxBl_or_fhat;")
    assert all(map(torch.equal, module.f_to_idxBl_or_fhat(*inputs(0), False), expected))


def test_a_whole_tokenizer(group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), build()).eval()
    images = torch.randn(2, 3, 24, 24)
    expected, _, loss = model(images)
    with patched(model):
        found, _, same = model(images)
    torch.testing.assert_close((found, same), (expected, loss))


def test_no_matrix(group):
    for znorm in (False, True):
        module, pairs = build(znorm), 2 * SIDES[-1] ** 2 * 256
        check_memory(module, Call("forward", inputs(0)), pairs)
        check_memory(module, Call("f_to_idxBl_or_fhat", (*inputs(0), False)), pairs)


def test_no_new_graph_break(group):
    for call in (Call("forward", inputs(0)), Call("f_to_idxBl_or_fhat", (*inputs(0), False))):
        module = build(True).train(call.method == "forward")
        before = graph_breaks(module, call)
        with patched(module):
            assert graph_breaks(module, call) <= before


class OtherScales(VectorQuantizer2):
    def _resized(self, rest, size, last):
        return super()._resized(rest, size, False) * 0.5


class OtherParameters(VectorQuantizer2):
    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None, noise=0.0):
        return super().f_to_idxBl_or_fhat(f_BChw, to_fhat, v_patch_nums)


class OtherBeta(VectorQuantizer2):
    def forward(self, f_BChw, ret_usages=False):
        found, usages, loss = super().forward(f_BChw, ret_usages)
        return found, usages, loss / self.beta


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherScales, "no VAR: forward in evaluation mode"),
        (OtherParameters, "no VAR (indices): 'f_to_idxBl_or_fhat' takes (f_BChw, to_fhat, v_patch_nums, noise)"),
        (OtherBeta, None),
    ],
)
def test_a_changed_class_is_left(kind, reason, group):
    module = build(kind=type("VectorQuantizer2", (kind,), {}))
    (entry,) = revq.patch(module, verbose=False).entries
    if reason is None:
        assert entry.family == "VAR (indices)" and autoregressive._Var not in type(module).__mro__
    else:
        assert not entry.patched and reason in entry.note
