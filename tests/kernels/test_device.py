"""On a CUDA device: the exactness contract, and training steps that are compiled or captured in a CUDA graph."""

import pytest
import torch

from revq_kernels import FastChannelVQ, explain, nearest_code, quantize, reset_codes_
from revq_kernels.testing.problems import Problem, assert_same_codes, problems

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PROBLEMS = list(problems())


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_index_follows_the_contract(problem: Problem, impl: str):
    indices = nearest_code(problem.x.cuda(), problem.codebook.cuda(), impl=impl)
    assert_same_codes(indices.cpu(), problem.x, problem.codebook)


@pytest.mark.parametrize(("n", "g", "k", "d"), [(256, 4, 16384, 4), (256, 2, 65536, 8), (100, 1, 30011, 17)])
def test_each_form_returns_the_indices_of_the_reference(n, g, k, d):
    from revq_kernels.triton import launches
    from revq_kernels.triton import plan as planning

    x, codebook = torch.randn(n, g, d, device="cuda"), torch.randn(g, k, d, device="cuda")
    codebook[:, k // 2 :: 3] = codebook[:, : len(range(k // 2, k, 3))]  # duplicate codes
    expected = nearest_code(x, codebook, impl="reference")
    for form in planning.FORMS:
        plan = planning.make_plan(n, g, k, d, planning.target_of(x.device), form)
        indices = torch.empty(n, g, dtype=torch.int64, device="cuda")
        workspaces = launches.search(x, codebook, indices, None, None, plan)
        assert torch.equal(indices, expected), form
        if form != "direct":
            assert workspaces[0].certified(plan.slots).float().mean() > 0.99


def test_auto_selects_triton():
    choice = explain(torch.randn(256, 4, 8, device="cuda"), torch.randn(4, 65536, 8, device="cuda"))
    assert choice.implementation == "triton"


def step(module: FastChannelVQ, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    module(x).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_training_steps_compiled_and_captured_equal_eager_ones(how):
    batches = torch.randn(6, 64, 8, 4, device="cuda")

    def module() -> FastChannelVQ:
        torch.manual_seed(0)
        return FastChannelVQ(2048, 4, num_groups=8, estimator="none").cuda()

    eager, other = module(), module()
    first = torch.optim.AdamW(eager.parameters(), lr=1e-2, capturable=True)
    second = torch.optim.AdamW(other.parameters(), lr=1e-2, capturable=True)
    for batch in batches:
        step(eager, first, batch)
    if how == "compiled":
        run = torch.compile(lambda x: other(x).loss, fullgraph=True)
        for batch in batches:
            second.zero_grad()
            run(batch).backward()
            second.step()
    else:
        x = batches[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile the kernels before the capture
            for batch in batches[:2]:
                x.copy_(batch)
                step(other, second, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        x.copy_(batches[2])
        with torch.cuda.graph(graph):
            step(other, second, x)
        for batch in batches[2:]:
            x.copy_(batch)
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager.count, other.count)
    assert torch.equal(eager.codebook, other.codebook)


def test_gradient_and_reset_equal_the_reference():
    x, weight = torch.randn(3000, 2, 5, device="cuda"), torch.randn(3000, 2, 5, device="cuda")
    codebook = torch.randn(2, 900, 5, device="cuda", requires_grad=True)
    gradients = []
    for _ in range(2):
        codebook.grad = None
        (quantize(x, codebook).quantized * weight).sum().backward()
        gradients.append(codebook.grad.clone())
    assert torch.equal(*gradients), "the default gradient is deterministic"
    codebook.grad = None
    (quantize(x, codebook, impl="reference").quantized * weight).sum().backward()
    torch.testing.assert_close(gradients[0], codebook.grad)

    count = torch.randint(0, 3, (2, 900), device="cuda")
    moved = reset_codes_(codebook.detach(), count, noise=0.0)
    on_cpu = codebook.detach().cpu().clone()
    assert torch.equal(moved.cpu(), reset_codes_(on_cpu, count.cpu(), noise=0.0))
    assert torch.equal(codebook.detach().cpu(), on_cpu)
