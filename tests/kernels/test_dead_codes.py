"""`ReplaceDeadCodes`: after each window, dead codes become distinct vectors of the batch and stay there."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ, ReplaceDeadCodes
from revq_kernels.nn.codebook_updates import distinct_rows


def far_codes(vq, dead):
    """Move the last codes of each group far from all data."""
    with torch.no_grad():
        vq.codebook[:, -dead:] += 1000.0
    if vq.update is not None:
        vq.update.restart_(vq.codebook, torch.ones_like(vq.count).bool())
    return vq


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_after_a_window_dead_codes_become_vectors_and_are_selected(ema, groups):
    vq = FastChannelVQ(
        8, 3, num_groups=groups, dead_codes=ReplaceDeadCodes(every=2), update=EMAUpdate() if ema else None
    )
    far_codes(vq, 5)
    x = torch.randn(4, 20, 3)
    for call in range(2):
        vq(x)
        assert not vq.dead_codes.moved.any(), call
    dead = vq.count == 0
    assert dead[:, -5:].all()
    before = vq.codebook.detach().clone()
    vq.count.zero_()
    out = vq(x)
    assert torch.equal(vq.dead_codes.moved, dead) and (vq.count[dead] > 0).all()
    if not ema:  # the averages move all codes after the replacement
        assert torch.equal(vq.codebook[~dead], before[~dead])
        for g in range(groups):
            rows = {tuple(row.tolist()) for row in vq.codebook[g][dead[g]]}
            vectors = {tuple(row.tolist()) for row in x[:, g::groups].reshape(-1, 3)}
            assert len(rows) == dead[g].sum() and rows <= vectors
    assert vq.codebook.max() < 100 and out.quantized.abs().max() < 100
    assert torch.equal(vq.dead_codes.used, vq.count) and vq.dead_codes.calls == 1
    vq(x)
    assert not vq.dead_codes.moved.any()


def test_the_threshold_is_in_selections():
    vq = FastChannelVQ(4, 1, dead_codes=ReplaceDeadCodes(threshold=3, every=1))
    with torch.no_grad():
        vq.codebook[0, :, 0] = torch.tensor([0.0, 10, 20, 30])
    x = torch.tensor([0.0, 0, 0, 0, 10, 10, 10, 20, 20])[None, :, None]
    vq(x)
    vq(x)
    assert vq.dead_codes.moved.tolist() == [[False, False, True, True]]


def test_masked_vectors_are_not_taken():
    vq = far_codes(FastChannelVQ(8, 2, dead_codes=ReplaceDeadCodes(every=1)), 7)
    x, mask = torch.randn(1, 30, 2), (torch.arange(30) < 3)[None]
    vq(x, mask=mask)
    vq(x, mask=mask)
    moved = vq.codebook[vq.dead_codes.moved]
    assert len(moved) == 7 and {tuple(row.tolist()) for row in moved} == {tuple(row.tolist()) for row in x[0, :3]}
    before = vq.codebook.detach().clone()
    vq(x, mask=torch.zeros(1, 30).bool())
    vq(x, mask=torch.zeros(1, 30).bool())
    assert torch.equal(vq.codebook, before) and not vq.dead_codes.moved.any()


def test_eval_and_empty_batches_replace_nothing():
    vq = far_codes(FastChannelVQ(8, 2, dead_codes=ReplaceDeadCodes(every=1)), 7)
    vq(torch.randn(1, 9, 2))
    before = vq.codebook.detach().clone()
    vq.eval()(torch.randn(1, 9, 2))
    vq.train()(torch.randn(0, 9, 2))
    assert torch.equal(vq.codebook, before)


def test_gradients_are_those_of_the_codes_that_were_searched():
    vq = far_codes(FastChannelVQ(8, 2, metric="cosine", dead_codes=ReplaceDeadCodes(every=1)), 7)
    x = torch.randn(2, 9, 2)
    for _ in range(3):
        vq(x).loss.backward()
    assert vq.codebook.grad.isfinite().all()


def test_rows_are_distinct_while_they_last():
    wanted = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 1, 0]]).bool().T
    for seed in range(20):
        source, some = distinct_rows(wanted, 5, mask, torch.Generator().manual_seed(seed))
        assert some.all() and sorted(source[0][wanted[0]].tolist()) == [0, 1, 2, 4]
        assert sorted(source[1].tolist()) == [0, 0, 0, 3, 3, 3], "six places, two rows: each three times"
    _, some = distinct_rows(wanted, 5, torch.zeros(5, 2).bool())
    assert not some.any()


def test_draws_follow_their_generator():
    first, again, other = (
        distinct_rows(torch.ones(1, 9).bool(), 50, None, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_wrong_arguments():
    policy = ReplaceDeadCodes()
    FastChannelVQ(4, 4, dead_codes=policy)
    for make, message in (
        (lambda: FastChannelVQ(4, 4, dead_codes=policy), r"dead_codes: expected a ReplaceDeadCodes of its own"),
        (lambda: ReplaceDeadCodes(threshold=0), r"threshold: expected an integer >= 1, got 0"),
        (lambda: ReplaceDeadCodes(every=2.5), r"every: expected an integer >= 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_two_calls_before_one_backward():
    vq = FastChannelVQ(8, 4, metric="cosine", dead_codes=ReplaceDeadCodes(every=1))
    x = torch.randn(2, 6, 4, requires_grad=True)
    (vq(x).loss + vq(x + 1).loss).backward()
    assert x.grad.isfinite().all() and vq.codebook.grad.isfinite().all()


@pytest.mark.parametrize("how", ["initialize_", "reset_"])
def test_codes_that_are_set_begin_a_window(how):
    vq = FastChannelVQ(8, 4, dead_codes=ReplaceDeadCodes(every=2))
    for _ in range(2):
        vq(torch.randn(2, 1, 4) + 100)
    vq.initialize_(torch.randn(2, 40, 4)) if how == "initialize_" else vq.reset_()
    before = vq.codebook.detach().clone()
    vq(torch.randn(2, 8, 4))
    assert not vq.dead_codes.moved.any() and torch.equal(vq.codebook, before)
    assert vq.count.sum() == 16
