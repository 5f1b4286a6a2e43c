"""torch.compile, torch.export and opcheck on the operators and on what is built from them."""

import copy
import subprocess
import sys

import pytest
import torch

from revq_kernels import (
    EMAUpdate,
    FastChannelVQ,
    MappedCodes,
    ProjectedVQ,
    ReplaceDeadCodes,
    ResidualVQ,
    count_codes_,
    nearest_code,
    quantize,
)
from revq_kernels.interop import formats


@pytest.fixture
def problem():
    return torch.randn(6, 3, 4), torch.randn(3, 20, 4), torch.zeros(3, 20, dtype=torch.int64)


def variant_of(impl):
    return "reference" if impl == "reference" else "default"


def test_opcheck(problem, impl):
    x, codebook, count = problem
    indices = nearest_code(x, codebook, impl=impl)
    check, of = torch.library.opcheck, variant_of(impl)
    for arguments in ((x, codebook), (x[:0], codebook), (x.transpose(0, 1).contiguous().transpose(0, 1), codebook)):
        check(getattr(torch.ops.revq.nearest_code, of), arguments)
        check(getattr(torch.ops.revq.nearest_by_metric, of), (*arguments, None, "inner_product"))
        check(getattr(torch.ops.revq.nearest_by_metric, of), (*arguments, arguments[0].clone(), "diagonal"))
        check(getattr(torch.ops.revq.quantize, of), (*arguments, None))
        check(getattr(torch.ops.revq.quantize, of), (*arguments, count))
    check(getattr(torch.ops.revq.count_codes_, of), (count, indices))
    check(getattr(torch.ops.revq.segment_sum, of), (x, indices, 20))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_functions_are_whole_graphs_and_equal(problem, impl, dynamic):
    x, codebook, count = problem
    codebook.requires_grad_()

    def step(x, codebook, count):
        quantized, indices = quantize(x * 1.0, codebook, count=count, impl=impl)
        count_codes_(count, indices, impl=impl)
        return (quantized * x).sum(), indices

    eager_count = count.clone()
    loss, indices = step(x, codebook, eager_count)
    (gradient,) = torch.autograd.grad(loss, codebook)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compiled_loss, compiled_indices = compiled(x, codebook, count)
    (compiled_gradient,) = torch.autograd.grad(compiled_loss, codebook)
    assert torch.equal(indices, compiled_indices) and torch.equal(count, eager_count)
    assert torch.equal(gradient, compiled_gradient)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_module(training):
    vq, other = (FastChannelVQ(16, 4, num_groups=2) for _ in range(2))
    other.load_state_dict(vq.state_dict())
    x = torch.randn(3, 8, 2, 2, requires_grad=True)
    compiled = torch.compile(other.train(training), fullgraph=True, backend="aot_eager")
    eager, traced = vq.train(training)(x), compiled(x)
    assert torch.equal(eager.indices, traced.indices) and torch.equal(eager.quantized, traced.quantized)
    (eager.loss + eager.quantized.sum()).backward()
    gradient, x.grad = x.grad, None
    (traced.loss + traced.quantized.sum()).backward()
    torch.testing.assert_close(x.grad, gradient)
    torch.testing.assert_close(other.codebook.grad, vq.codebook.grad)
    assert torch.equal(vq.count, other.count)


def test_native_by_name_compiles_before_anything_loaded_it():
    program = (
        "import torch, revq_kernels\n"
        "x, c = torch.randn(9, 2, 4), torch.randn(2, 30, 4)\n"
        "f = torch.compile(lambda x, c: revq_kernels.nearest_code(x, c, impl='native'), fullgraph=True, backend='eager')\n"
        "assert not revq_kernels.native.is_loaded()\n"
        "assert torch.equal(f(x, c), revq_kernels.nearest_code(x, c, impl='reference'))\n"
        "assert revq_kernels.native.is_loaded()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_inductor_does_not_look_inside(problem):
    x, codebook, _ = problem
    compiled = torch.compile(lambda x, c: nearest_code(x + 0, c, impl="reference"), fullgraph=True)
    assert torch.equal(compiled(x, codebook), nearest_code(x, codebook))


def test_encode_and_decode_compile():
    vq, x = FastChannelVQ(16, 4, num_groups=2), torch.randn(3, 8, 4)
    compiled = torch.compile(lambda x: vq.decode(vq.encode(x)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), vq.decode(vq.encode(x)))


def test_export_with_a_dynamic_batch():
    vq = FastChannelVQ(16, 4, num_groups=2).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(vq, (torch.randn(3, 8, 2, 2),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 8, 2, 2)
    assert torch.equal(program.module()(x).indices, vq(x).indices)
    assert any("revq" in str(node.target) for node in program.graph.nodes)


OPTIONS = {
    "cosine and rotation": lambda: FastChannelVQ(16, 4, metric="cosine", estimator="rotation", split="space"),
    "cosine_lookup and mapped": lambda: FastChannelVQ(
        16, 4, metric="cosine_lookup", codes=MappedCodes(torch.randn(16, 6), torch.nn.Linear(6, 4))
    ),
    "inner_product": lambda: FastChannelVQ(16, 4, metric="inner_product", output_format=formats.taming),
    "dead_codes and ema": lambda: FastChannelVQ(16, 4, dead_codes=ReplaceDeadCodes(every=1), update=EMAUpdate()),
    "residual": lambda: ResidualVQ([FastChannelVQ(16, 4) for _ in range(2)], quantizer_dropout=0.0),
    "projected": lambda: ProjectedVQ(8, FastChannelVQ(16, 4, layout="BCHW", split="space")),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_options(option, training):
    torch._dynamo.reset()  # each option compiles another graph, and the default limit is eight
    module = OPTIONS[option]().train(training)
    other = copy.deepcopy(module)
    mask = torch.tensor([[True], [True], [False]]) if option != "residual" else None
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call replaces codes
        x = torch.randn(3, 8, 2, 2, requires_grad=True)
        eager, traced = [], []
        for run, found in ((module, eager), (compiled, traced)):
            torch.manual_seed(1)
            quantized, *rest = run(x, mask=mask)
            found += [quantized, *(tensor for tensor in rest if isinstance(tensor, torch.Tensor))]
            (gradient,) = torch.autograd.grad(quantized.sum() + sum(t for t in found if t.dim() == 0), x)
            found.append(gradient)
        for ours, theirs in zip(eager, traced, strict=True):
            torch.testing.assert_close(ours, theirs)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])
    if option == "dead_codes and ema" and training:
        assert module.dead_codes.moved.any() and torch.equal(module.dead_codes.moved, other.dead_codes.moved)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("BLC", {"estimator": "rotation"}),
        ("BCHW", {"metric": "cosine_lookup"}),
        ("BLC", {"metric": "cosine_lookup", "estimator": "rotation", "masked": True}),
    ],
)
def test_the_backward_pass_leaves_the_results_alone(layout, options):
    """By the default backend, which lets saved tensors and results share memory; on sizes that it vectorizes."""
    torch._dynamo.reset()
    options = dict(options)  # the parameter is shared by runs
    masked = options.pop("masked", False)
    vq = FastChannelVQ(64, 8, layout=layout, split="space", **options)
    other = copy.deepcopy(vq)
    x = torch.randn(4, 64, 8) if layout == "BLC" else torch.randn(4, 8, 8, 8)
    mask = torch.rand(4, 64) > 0.3 if masked else None
    compiled, inputs, results = torch.compile(other, fullgraph=True), [], []
    for run in (vq, compiled):
        inputs.append(x.clone().requires_grad_())
        out = run(inputs[-1], mask=mask)
        before = [tensor.detach().clone() for tensor in out]
        (out.loss + out.quantized.square().sum()).backward()
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(out, before, strict=True))
        results.append(out)
    assert torch.equal(results[0].quantized, results[1].quantized)
    assert torch.equal(results[0].indices, results[1].indices)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_dead_codes_are_replaced_in_batches_of_any_size():
    torch._dynamo.reset()
    vq = FastChannelVQ(16, 4, dead_codes=ReplaceDeadCodes(every=1), update=EMAUpdate(), num_groups=2)
    other = copy.deepcopy(vq)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 9, 1, 0, 4):
        x, indices = torch.randn(batch, 8, 4), []
        for run in (vq, compiled):
            torch.manual_seed(batch)
            indices.append(run(x).indices)
        assert torch.equal(*indices)
    for name, tensor in vq.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])
