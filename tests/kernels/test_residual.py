"""Residual stages: values, gradients, dropout, prefixes, groups."""

import pytest
import torch
import torch.nn.functional as F

from revq_kernels import EMAUpdate, FastChannelVQ, ProjectedVQ, ResidualVQ
from revq_kernels.testing.problems import contract_index


def stages(number=3, *, ema=False, **options):
    made = []
    for scale in range(number):
        vq = FastChannelVQ(12, 4, update=EMAUpdate() if ema else None, **options)
        with torch.no_grad():
            vq.codebook *= 0.6**scale
        made.append(vq)
    return made


def test_values_are_those_of_a_loop():
    rvq, x = ResidualVQ(stages()), torch.randn(2, 9, 4)
    out = rvq(x)
    residual, total, loss = x, torch.zeros_like(x), 0.0
    for number, stage in enumerate(rvq.stages):
        indices = contract_index(residual.reshape(-1, 1, 4), stage.codebook).reshape(2, 9)
        assert torch.equal(out.indices[..., number], indices)
        codes = stage.codebook.detach()[0, indices]
        loss += 1.25 * F.mse_loss(codes, residual)
        total, residual = total + codes, residual - codes
        torch.testing.assert_close(rvq.decode(out.indices[..., : number + 1]), total, rtol=0, atol=0)
    assert torch.equal(out.quantized, total) and torch.equal(rvq.encode(x), out.indices)
    torch.testing.assert_close(out.loss, loss)
    assert all(stage.count.sum() == 18 for stage in rvq.stages)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "none"])
def test_every_stages_commitment_reaches_x_and_the_decoder_does_once(estimator):
    rvq, x = ResidualVQ(stages(estimator=estimator)), torch.randn(2, 9, 4, requires_grad=True)
    out = rvq(x)
    (gradient,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    residual, truth = x.detach().double(), 0.0
    for number, stage in enumerate(rvq.stages):
        residual = residual - stage.codebook.detach()[0, out.indices[..., number]].double()
        truth = truth + 0.25 * 2 * residual / x.numel()
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-7)
    assert torch.equal(out.quantized, rvq.decode(out.indices))
    (gradient,) = torch.autograd.grad(out.quantized.sum(), x, allow_unused=True)
    if estimator == "straight_through":
        assert torch.equal(gradient, torch.ones_like(x))
    else:
        assert (gradient is None or gradient.abs().sum() == 0) == (estimator == "none")


def test_quantizer_dropout():
    rvq, x = ResidualVQ(stages(), quantizer_dropout=0.7), torch.randn(300, 4, 4)
    out = rvq(x)
    used = (out.indices >= 0).sum(-1)
    assert (used == used[:, :1]).all() and (out.indices.sort(descending=True).values >= -1).all()
    share = torch.bincount(used[:, 0], minlength=4) / 300
    for n, expected in enumerate((0, 0.7 / 3, 0.7 / 3, 0.3 + 0.7 / 3)):
        assert share[n].item() == pytest.approx(expected, abs=0.1 if expected else 0)
    full = ResidualVQ(rvq.stages).encode(x)
    for n in range(1, 4):
        of_n = used[:, 0] == n
        assert torch.equal(out.indices[of_n][..., :n], full[of_n][..., :n])
        assert torch.equal(out.quantized[of_n], rvq.decode(full[of_n][..., :n]))
    assert torch.equal(out.quantized, rvq.decode(out.indices)), "-1 adds nothing"
    assert [int(stage.count.sum()) for stage in rvq.stages] == [int((used >= n).sum()) for n in (1, 2, 3)]
    assert (rvq.eval()(x).indices >= 0).all()


def test_masks_and_dropout_together():
    rvq = ResidualVQ(stages(ema=True), quantizer_dropout=1.0)
    x, lengths = torch.randn(70, 6, 4), torch.arange(70) % 7
    out = rvq(x, lengths=lengths)
    counts = torch.arange(6) < lengths[:, None]
    assert torch.equal(out.indices[..., 0] >= 0, counts) and not (out.indices[..., 1] >= 0)[~counts].any()
    assert torch.equal(out.quantized[~counts], x[~counts])
    assert rvq.stages[0].count.sum() == counts.sum() > rvq.stages[1].count.sum() > rvq.stages[2].count.sum()


def test_stages_that_project():
    vqs = [ProjectedVQ(6, FastChannelVQ(9, 3, layout="BDT", split="space", metric="cosine_lookup")) for _ in range(3)]
    rvq, x = ResidualVQ(vqs, quantizer_dropout=0.5), torch.randn(30, 6, 5, requires_grad=True)
    out = rvq(x)
    torch.testing.assert_close(rvq.decode(out.indices, (6, 5)), out.quantized, rtol=1e-4, atol=1e-5)
    out.quantized.square().sum().backward()
    assert all(stage.project_in.weight.grad.abs().sum() > 0 for stage in rvq.stages)
    assert all(stage.project_out.weight.grad.abs().sum() > 0 for stage in rvq.stages)
    out = rvq.eval()(x)
    torch.testing.assert_close(rvq.decode(out.indices[..., :1], (6, 5)), vqs[0](x).quantized, rtol=1e-4, atol=1e-5)


def test_groups_are_quantizers_of_parts_of_the_channels():
    grouped = ResidualVQ(
        [FastChannelVQ(10, 2, num_groups=3, layout="BLC", split="space") for _ in range(2)],
    )
    x = torch.randn(2, 5, 6)
    out = grouped(x)
    assert out.indices.shape == (2, 15, 2)
    for g in range(3):
        alone = ResidualVQ([FastChannelVQ(10, 2) for _ in range(2)])
        for mine, theirs in zip(alone.stages, grouped.stages, strict=True):
            mine.codebook = torch.nn.Parameter(theirs.codebook[g : g + 1].detach().clone())
        part = alone(x[..., 2 * g : 2 * g + 2].contiguous())
        assert torch.equal(out.quantized[..., 2 * g : 2 * g + 2], part.quantized)
        assert torch.equal(out.indices.reshape(2, 5, 3, 2)[:, :, g], part.indices)


def test_initialization_stage_by_stage():
    rvq, x = ResidualVQ(stages(layout="BCHW", split="space")), torch.randn(4, 4, 3, 3)
    rvq.initialize_(x, iterations=3)
    out = rvq.eval()(x)
    errors = [(rvq.decode(out.indices[..., :n], (4, 3, 3)) - x).square().mean().item() for n in (1, 2, 3)]
    assert errors[0] < x.square().mean() and errors[2] < errors[1] < errors[0]


def test_low_precision_input_and_residuals_of_float32():
    rvq, x = ResidualVQ(stages()), torch.randn(2, 9, 4).bfloat16()
    out = rvq(x)
    assert out.quantized.dtype == torch.bfloat16
    assert torch.equal(out.indices, rvq(x.float()).indices)
    assert torch.equal(out.quantized, rvq.decode(out.indices).bfloat16())


def test_wrong_arguments():
    for make, message in (
        (lambda: ResidualVQ([]), r"stages: expected one or more, .* got \[\]"),
        (lambda: ResidualVQ([FastChannelVQ(4, 4), ProjectedVQ(4, FastChannelVQ(4, 4))]), r"got \[FastChannelVQ, Proj"),
        (lambda: ResidualVQ(stages(), quantizer_dropout=1.5), r"quantizer_dropout: expected a share .* got 1.5"),
        (lambda: ResidualVQ(stages()).decode(torch.zeros(1, 2, 4).long()), r"expected \[B, T, q\] with 1 <= q <= 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
