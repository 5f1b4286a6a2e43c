"""vector-quantize-pytorch's VectorQuantize, ResidualVQ, GroupedResidualVQ, SimVQ and modules around them, unmodified."""

from functools import partial

import pytest
import torch
from drop_in_case import Call, check_call, check_memory, check_quantizer, check_training, graph_breaks, patched
from torch import nn

import revq

pytest.importorskip("vector_quantize_pytorch", reason="the unmodified package is the reference here")
from vector_quantize_pytorch import GroupedResidualVQ, RandomProjectionQuantizer, ResidualVQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.hierarchical_vq import HierarchicalVQ
from vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook, gumbel_sample

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")  # a warning of the package for masked heads

LEARNED = {"learnable_codebook": True, "ema_update": False}
SEPARATE = {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}
vq = partial(VectorQuantize, dim=8, codebook_size=32)
rvq = partial(ResidualVQ, dim=8, codebook_size=32, num_quantizers=3)


def maker(kind, **options):
    def build():
        torch.manual_seed(0)
        return kind(**options)

    return build


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequence(seed):
    return (draw(seed, 2, 16, 8),)


def many(seed):
    return (draw(seed, 2, 256, 8),)


def image(seed):
    return (draw(seed, 2, 8, 4, 4),)


def masked(seed):
    return draw(seed, 2, 16, 8), None, torch.arange(16).expand(2, -1) < torch.tensor([[16], [9]])


def with_indices(seed):
    return draw(seed, 2, 16, 8), torch.arange(32).view(2, 16)


TRAINED = {
    "euclidean": (vq, {}, sequence),
    "cosine": (vq, {"use_cosine_sim": True}, sequence),
    "heads with their own": (vq, SEPARATE | {"use_cosine_sim": True, "threshold_ema_dead_code": 2}, sequence),
    "mask, k-means, dead codes": (vq, {"kmeans_init": True, "threshold_ema_dead_code": 2}, masked),
    "k-means of two heads, cosine": (vq, SEPARATE | {"kmeans_init": True, "use_cosine_sim": True}, sequence),
    "learned, dead codes": (vq, LEARNED | {"threshold_ema_dead_code": 2}, sequence),
    "straight-through, image": (vq, {"rotation_trick": False, "accept_image_fmap": True}, image),
    "optimized in place": (
        vq,
        LEARNED | {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)},
        sequence,
    ),
    "residual, k-means": (rvq, {"rotation_trick": False, "kmeans_init": True, "threshold_ema_dead_code": 2}, sequence),
    "SimVQ": (SimVQ, {"dim": 8, "codebook_size": 32}, sequence),
}

CALLED = {  # in float32 only: rounding in bfloat16 projections and rotations changes the vectors that are searched
    "masked heads": (vq, SEPARATE | {"codebook_dim": 8}, masked),
    "channels first": (vq, {"channel_last": False}, lambda seed: (draw(seed, 2, 8, 16),)),
    "one vector each": (vq, {}, lambda seed: (draw(seed, 6, 8),)),
    "SimVQ, channels first": (
        SimVQ,
        {"dim": 8, "codebook_size": 32, "channel_first": True, "rotation_trick": False},
        image,
    ),
    "heads of one codebook": (vq, {"heads": 2, "codebook_dim": 4}, sequence),
    "projected image": (vq, {"accept_image_fmap": True, "codebook_dim": 4}, image),
    "diversity loss": (vq, {"codebook_diversity_loss_weight": 1.0}, sequence),
    "cross entropy": (vq, {"commitment_use_cross_entropy_loss": True}, sequence),
    "cross entropy to given codes": (vq, {}, with_indices),
    "drawn codes": (vq, {"stochastic_sample_codes": True}, sequence),
    "mixed codes": (vq, {"straight_through": True, "rotation_trick": False}, sequence),
    "affine": (vq, {"affine_param": True}, sequence),
    "affine, learned": (vq, LEARNED | {"affine_param": True}, masked),
    "cosine, learned": (vq, {"orthogonal_reg_weight": 1.0, "use_cosine_sim": True}, sequence),
    "bridge": (lambda: vq(vq_bridge=nn.Linear(8, 8)), {}, sequence),
    "directional": (vq, {"directional_reparam": True, "threshold_ema_dead_code": 2}, sequence),
    "synchronous": (vq, LEARNED | {"sync_update_v": 0.5}, sequence),
    "frozen": (vq, {"freeze_codebook": True}, sequence),
    "residual, shared": (rvq, {"shared_codebook": True, "threshold_ema_dead_code": 2}, sequence),
    "residual, dropout": (rvq, {"quantize_dropout": True}, sequence),
    "residual, beam": (rvq, {"beam_size": 2}, sequence),
    "residual, implicit": (rvq, {"implicit_neural_codebook": True}, sequence),
    "grouped": (GroupedResidualVQ, {"dim": 8, "groups": 2, "codebook_size": 32, "num_quantizers": 2}, sequence),
    "residual SimVQ": (ResidualSimVQ, {"dim": 8, "codebook_size": 32, "num_quantizers": 2}, sequence),
    "hierarchical": (
        HierarchicalVQ,
        {"dim": 8, "codebook_size": 16, "scales": (2, 4, 16)},
        lambda seed: (draw(seed, 8, 8, 16),),
    ),
    "random projections": (
        RandomProjectionQuantizer,
        {"dim": 8, "codebook_size": 32, "codebook_dim": 4, "num_codebooks": 2},
        sequence,
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained(name):
    kind, options, inputs = TRAINED[name]
    check_quantizer(maker(kind, **options), inputs)


@pytest.mark.parametrize("name", CALLED)
def test_called(name):
    kind, options, inputs = CALLED[name]
    with patched(maker(kind, **options)(), verify=True):
        pass
    for training in (False, True):
        check_call(maker(kind, **options)(), Call("forward", inputs(0)), training=training)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38, -1.0])
@pytest.mark.parametrize("name", ["affine", "affine, learned"])
def test_buffers_without_values_decide_nothing(name, garbage):
    """Before the first training step the means and variances are what was in the memory."""
    kind, options, _ = CALLED[name]
    module = maker(kind, **options)()
    codebook = module._codebook
    for buffer in ("codebook_mean", "codebook_variance"):
        assert getattr(codebook, f"{buffer}_needs_init")
        getattr(codebook, buffer).fill_(garbage)
    with patched(module, verify=True):  # raises if the check refuses it
        pass
    assert codebook.codebook_mean.isnan().all() or (codebook.codebook_mean == garbage).all()


@pytest.mark.parametrize(
    "name", ["masked heads", "affine", "residual, shared", "residual, dropout", "residual, beam", "grouped"]
)
def test_twenty_steps(name):
    kind, options, inputs = CALLED[name]
    check_training(maker(kind, **options)(), "forward", inputs, 20)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}])
def test_autocast_makes_the_original_choose_wrong_codes(options):
    assert check_quantizer(maker(VectorQuantize, dim=8, codebook_size=512, **options), many, steps=0) > 0


def test_stages_under_autocast():
    """Rotation and projection round to bfloat16, so each stage is checked with the vectors that it gets."""
    model, wrong = maker(rvq, codebook_dim=4)().train(), []

    def before(codebook, arguments):
        codebook.held = codebook.embed.clone()

    def after(codebook, arguments, result):
        distances = torch.cdist(arguments[0].double(), codebook.held.double())
        wrong.append(int((result[1] != distances.argmin(dim=-1)).sum()))

    for layer in model.layers:
        layer._codebook.register_forward_pre_hook(before)
        layer._codebook.register_forward_hook(after)
    with patched(model), torch.autocast("cpu", torch.bfloat16):
        model(draw(0, 2, 256, 8))
    assert wrong == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"kmeans_init": True}, LEARNED, SEPARATE])
def test_no_matrix(options):
    inputs = draw(0, 2, 512, 8)
    check_memory(maker(VectorQuantize, dim=8, codebook_size=512, **options)(), Call("forward", (inputs,)), 1024 * 512)


def test_cosine_codebook_of_any_norms():
    """The package takes the largest inner product, which is that of the nearest code only if all norms are equal."""
    module = maker(vq, use_cosine_sim=True)()._codebook
    x = nn.functional.normalize(draw(0, 2, 64, 8), dim=-1)
    module.embed.mul_(torch.linspace(0.5, 2, 32).unsqueeze(1))
    expected = module.eval()(x)[1]
    assert (expected != torch.cdist(x, module.embed).argmin(dim=-1)).any()
    with patched(module):
        assert torch.equal(module(x)[1], expected)


def test_close_codes_tie():
    """The package clamps distances to 1e-4, so among nearer codes it takes the first."""
    module = maker(vq)()._codebook
    module.embed.mul_(7e-4)
    x = module.embed * 0.7
    expected = module.eval()(x)[1]
    nearest = torch.cdist(x, module.embed).argmin(dim=-1)
    assert (expected != nearest).any() and (expected > 0).any()
    with patched(module):
        assert torch.equal(module(x)[1], expected)


@pytest.mark.parametrize("training", [False, True])
def test_distances_on_demand(training):
    """Values and gradient of the matrix equal the original's bit for bit, also after the update of the codebook."""
    found = []
    for patch in (False, True):
        codebook = maker(vq)()._codebook.train(training)
        x = draw(0, 2, 16, 8).requires_grad_()
        if patch:
            revq.patch(codebook, verbose=False)
        distances = codebook(x)[2]
        distances.softmax(dim=-1).square().sum().backward()
        found.append((distances.detach().clone(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_updates_by_the_caller():
    """Updates by one-hots, with weights, and accumulated before they are applied."""
    results = []
    for patch in (False, True):
        model = maker(vq)().train()
        if patch:
            revq.patch(model, verbose=False)
        codebook, x = model._codebook, draw(0, 1, 16, 8)
        indices = torch.arange(16).view(1, 16) % 7
        one_hot = nn.functional.one_hot(indices, 32).float()
        codebook.update_codebook(x, one_hot)
        model.update_indices(x, indices)
        model(x, ema_update_weight=torch.linspace(0.5, 1, 32))
        model(x, ema_update_weight=lambda sums, sizes: (sizes > 0).float())
        model(x, accum_ema_update=True)
        model(x)
        results.append(list(model.state_dict().values()))
    for original, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, original)


def test_whole_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), maker(GroupedResidualVQ, dim=16, groups=2, num_quantizers=2, codebook_size=64)()
    )
    x = draw(0, 2, 32, 6)
    expected = model.eval()(x)
    with patched(model, verify=True) as report:
        assert len(report.entries) == 4
        found = model(x)
        codes = model[1].get_output_from_indices(found[1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(codes, found[0])


@pytest.mark.parametrize("kind, training", [(vq, True), (partial(SimVQ, dim=8, codebook_size=32), True)])
def test_compiles(kind, training):
    build = maker(kind)
    call = Call("forward", sequence(0))
    before = graph_breaks(build().train(training), call)
    expected = build().train(training)(*call.args)
    with patched(build().train(training), verify=True) as report:
        assert graph_breaks(report.model, call) <= before
    with patched(build().train(training), verify=True) as report:
        found = torch.compile(report.model, backend="eager")(*call.args)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class OtherParameter(Codebook):
    def forward(self, x, temperature=1.0, mask=None):
        return super().forward(x, temperature, mask)


class OtherDistance(Codebook):
    def forward(self, x, *args, **kwargs):
        return super().forward(x - 0.1, *args, **kwargs)


OtherDistance.forward.__wrapped__ = Codebook.forward  # so its parameter names are the known ones


class OtherMean(Codebook):
    def track_cluster_size_and_embed_avg(
        self, flatten, embed_onehot, mask=None, ema_update_weight=None, accum_ema_update=False
    ):
        super().track_cluster_size_and_embed_avg(flatten, embed_onehot / 2, mask, ema_update_weight, accum_ema_update)


def of_another_version(kind):
    kind.__module__, kind.__qualname__ = Codebook.__module__, Codebook.__qualname__
    return maker(kind, dim=8, codebook_size=32)


def other_choice():
    codebook = maker(vq)()._codebook
    codebook.gumbel_sample = lambda logits, **options: gumbel_sample(logits)
    return codebook


class OtherLoss(SimVQ):
    def forward(self, x):
        quantized, indices, loss = super().forward(x)
        return quantized, indices, 2 * loss


OtherLoss.__module__, OtherLoss.__qualname__ = SimVQ.__module__, SimVQ.__qualname__


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (of_another_version(OtherParameter), "temperature"),
        (of_another_version(OtherDistance), "differ"),
        (of_another_version(OtherMean), "cluster_size is off by"),
        (other_choice, "gumbel_sample"),
        (maker(OtherLoss, dim=8, codebook_size=32), "off by"),
    ],
)
def test_another_version_is_left(build, reason):
    module = build()
    report = revq.patch(module, verbose=False)
    assert [entry.patched for entry in report.entries] == [False], report
    assert reason in report.entries[0].note


def test_simvq_projects_in_float32_under_autocast():
    def build():
        torch.manual_seed(0)
        return SimVQ(dim=8, codebook_size=512)

    def vectors(seed):
        return (torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(seed)),)

    assert check_quantizer(build, vectors, steps=0) > 0, "the original projects its codes in bfloat16, and errs"
