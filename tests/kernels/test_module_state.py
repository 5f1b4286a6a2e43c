"""Quantizers made on the meta device, in inference mode, under other default dtypes, copied, and without float64."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revq_kernels import EMAUpdate, FastChannelVQ, MappedCodes, ProjectedVQ, ReplaceDeadCodes, ResidualVQ, explain, ops


def dead_codes():
    return ReplaceDeadCodes(every=1, generator=torch.Generator("cpu").manual_seed(1))


MAKES = {
    "plain": lambda: FastChannelVQ(8, 4, estimator="rotation"),
    "cosine": lambda: FastChannelVQ(8, 4, metric="cosine"),
    "averages": lambda: FastChannelVQ(8, 4, update=EMAUpdate()),
    "dead codes": lambda: FastChannelVQ(8, 4, dead_codes=dead_codes()),
    "mapped": lambda: FastChannelVQ(8, 4, codes=MappedCodes(torch.randn(8, 6), nn.Linear(6, 4))),
    "projected": lambda: ProjectedVQ(4, FastChannelVQ(8, 4, update=EMAUpdate(), metric="inner_product")),
    "residual": lambda: ResidualVQ(
        [FastChannelVQ(8, 4, update=EMAUpdate(), dead_codes=ReplaceDeadCodes(every=1)) for _ in range(2)],
        quantizer_dropout=0.5,
    ),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def train(module, x=None):
    """Some steps; everything that a call reads and writes has data."""
    x = torch.randn(3, 20, 4) if x is None else x
    for _ in range(3):
        out = module(x.clone().requires_grad_())
        (out.loss + out.quantized.float().sum()).backward()
    assert out.loss.isfinite()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert not tensor.is_meta and tensor.isfinite().all(), name
    module.decode(module.encode(x))
    return out


def equal_from_here(module, other):
    """Whether the next steps of both are equal, with equal random numbers."""
    x = torch.randn(3, 20, 4)
    for _ in range(2):
        results = []
        for one in (module, other):
            torch.manual_seed(3)
            results.append(one(x))
        assert torch.equal(results[0].indices, results[1].indices)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def on_meta(make):
    with torch.device("meta"):
        return make()


@each
@pytest.mark.parametrize("assign", [False, True])
def test_a_module_made_on_meta_loads_a_state_and_trains(make, assign):
    trained, module = make(), on_meta(make)
    train(trained)
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(trained.state_dict(), assign=assign)
    fresh = make()
    for name, buffer in module.named_buffers():
        assert buffer.dtype == dict(fresh.named_buffers())[name].dtype, name
    reloaded = make()
    reloaded.load_state_dict(trained.state_dict())
    equal_from_here(module, reloaded)
    train(module)


@each
def test_a_module_made_on_meta_starts_as_one_made_in_place(make):
    module = on_meta(make).to_empty(device="cpu")
    if isinstance(module, FastChannelVQ) and module.codes is not None:
        module.codes.table.normal_()
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name, buffer in module.named_buffers():
        if name.endswith(("count", "used", "calls", "moved", "number")):
            assert not buffer.any(), name
    train(module)


@each
def test_codes_that_are_assigned_without_the_rest(make):
    module, state = on_meta(make), make().state_dict()
    kept = {name: value for name, value in state.items() if not re.search(r"update|dead_codes|count", name)}
    module.load_state_dict(kept, assign=True, strict=False)
    if make is MAKES["mapped"]:
        module.load_state_dict(state, assign=True)  # without a codebook, nothing says where a count should be
    train(module)


def test_averages_that_are_assigned_in_another_dtype_are_float32():
    vq = on_meta(MAKES["averages"])
    vq.load_state_dict(
        {name: value.bfloat16() for name, value in MAKES["averages"]().state_dict().items()}, assign=True
    )
    assert vq.update.embed_sum.dtype == vq.update.cluster_size.dtype == torch.float32


@each
def test_shapes_on_meta(make):
    module, x = on_meta(make), torch.randn(3, 20, 4, device="meta")
    if getattr(module, "dead_codes", None) is not None:
        module.dead_codes.generator = None  # it is of one device
    for run in (module, module.eval()):
        assert run(x).quantized.shape == x.shape
        assert run.decode(run.encode(x)).shape == x.shape


@each
def test_a_module_made_in_inference_mode_trains(make):
    with torch.inference_mode():
        if make is MAKES["mapped"]:  # the projector is the caller's
            with torch.inference_mode(False):
                linear = nn.Linear(6, 4)
            module = FastChannelVQ(8, 4, codes=MappedCodes(torch.randn(8, 6), linear))
        else:
            module = make()
        module(torch.randn(2, 5, 4))
        if isinstance(module, FastChannelVQ):
            module = copy.deepcopy(module).to(torch.float32)
            if module.codes is None:
                module.initialize_(torch.randn(9, 9, 4))
                module.reset_()
    train(module)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_default_dtypes(make, dtype):
    torch.set_default_dtype(dtype)
    try:
        module = make()
        own = [t for name, t in [*module.named_parameters(), *module.named_buffers()] if "project" not in name]
        assert {t.dtype for t in own if t.is_floating_point()} == {torch.float32}
        x = torch.randn(3, 20, 4, dtype=torch.float32)
        x = x.to(dtype) if isinstance(module, ProjectedVQ) and dtype != torch.float64 else x
        out = train(module, x)
        assert out.quantized.dtype == x.dtype and out.loss.dtype == torch.float32
        if make is not MAKES["mapped"]:
            module.initialize_(x, iterations=2)
        if isinstance(module, FastChannelVQ):
            assert module.utilization.dtype == module.perplexity.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@each
def test_copies_go_on_as_the_original(make):
    module = make()
    train(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        equal_from_here(copy.deepcopy(module), copied)
        train(copied)


class NoFloat64(TorchDispatchMode):
    """A device without float64: no operator may make such a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return result


def test_the_mode_refuses_float64():
    with NoFloat64(), pytest.raises(TypeError, match="makes float64"):
        torch.zeros(3).double()


@each
def test_no_float64(make):
    with NoFloat64():
        module, x = make(), torch.randn(3, 20, 4)
        train(module)
        if make is not MAKES["mapped"]:
            module.initialize_(x, iterations=2)
        for part in module.modules():
            if isinstance(part, FastChannelVQ):
                assert part.utilization.isfinite() and part.perplexity is not None
                if part.codes is None:
                    part.reset_()
        module.load_state_dict(module.state_dict())
        module.eval()(x)
        train(module.train())


def test_a_device_without_float64_searches_on_the_cpu():
    with FakeTensorMode():
        x, codebook = torch.empty(4, 1, 4, device="mps"), torch.empty(1, 8, 4, device="mps")
        assert "on the CPU, as mps has no float64" in explain(x, codebook).reason
        assert "on the CPU, as mps has no float64" in explain(x, codebook, metric="inner_product").reason
    x, codebook, count = torch.randn(9, 1, 4), torch.randn(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64)
    quantized, indices = ops.on_cpu(torch.ops.revq.quantize.default, (x, codebook, count))
    expected = torch.ops.revq.quantize(x, codebook, None)
    assert torch.equal(quantized, expected[0]) and torch.equal(indices, expected[1]) and count.sum() == 9
