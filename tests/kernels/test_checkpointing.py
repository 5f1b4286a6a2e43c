"""Activation checkpointing: a recomputed forward pass changes no state and sees the codes of its first run."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from revq_kernels import EMAUpdate, FastChannelVQ, ReplaceDeadCodes, ResidualVQ


def both(**options):
    return FastChannelVQ(16, 4, update=EMAUpdate(0.5), dead_codes=ReplaceDeadCodes(every=1), **options)


QUANTIZERS = {
    "plain": lambda: FastChannelVQ(16, 4),
    "averages, cosine": lambda: FastChannelVQ(16, 4, metric="cosine", update=EMAUpdate(0.5)),
    "dead codes, learned": lambda: FastChannelVQ(16, 4, metric="cosine", dead_codes=ReplaceDeadCodes(every=1)),
    "both, rotation": lambda: both(estimator="rotation"),
    "residual": lambda: ResidualVQ([both(), both()], quantizer_dropout=0.5),
}


class Block(nn.Module):
    """What draws random numbers after the quantizer must draw the same ones again."""

    def __init__(self, quantizer):
        super().__init__()
        self.before, self.quantizer, self.after = nn.Linear(4, 4), quantizer, nn.Linear(4, 4)

    def forward(self, x):
        out = self.quantizer(self.before(x))
        return nn.functional.dropout(self.after(out.quantized), 0.3).square().sum() + out.loss


def policy(context, op, *args, **kwargs):
    """Saves what the updates of the averages use as well."""
    saved = (
        torch.ops.aten.addmm.default,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.sum.default,
    )
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, policy)
FORMS = {
    "reentrant": lambda run: lambda x: checkpoint(run, x, use_reentrant=True),
    "not reentrant": lambda run: lambda x: checkpoint(run, x, use_reentrant=False),
    "nested": lambda run: FORMS["not reentrant"](FORMS["not reentrant"](run)),
    "nested, reentrant": lambda run: FORMS["reentrant"](FORMS["reentrant"](run)),
    "nested, both": lambda run: FORMS["not reentrant"](FORMS["reentrant"](run)),
    "selective": lambda run: lambda x: checkpoint(run, x, use_reentrant=False, context_fn=SELECTIVE),
}


def train(block, run, calls, steps=3, requires_grad=True):
    """Gradients and state of some steps, each with several calls before one backward pass."""
    optimizer = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(steps):
        inputs = torch.randn(calls, 5, 6, 4, generator=torch.Generator().manual_seed(step))
        inputs = [x.clone().requires_grad_(requires_grad) for x in inputs]
        torch.manual_seed(step)
        optimizer.zero_grad()
        sum(run(x) for x in inputs).backward()
        found += [p.grad.clone() for p in block.parameters() if p.grad is not None]
        found += [x.grad for x in inputs if requires_grad]
        optimizer.step()
    return found + [tensor.clone() for tensor in block.state_dict().values()]


def check(block, form, calls, compiled=False, **options):
    other = copy.deepcopy(block)
    expected = train(block, block, calls, **options)
    inner = torch.compile(other, fullgraph=True, backend="aot_eager") if compiled else other
    found = train(other, form(inner), calls, **options)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_checkpoints_change_nothing(quantizer, form, calls):
    check(Block(QUANTIZERS[quantizer]()), FORMS[form], calls)


@pytest.mark.parametrize("form", ["reentrant", "not reentrant"])
def test_a_compiled_module_in_a_checkpoint(form):
    torch._dynamo.reset()
    check(Block(FastChannelVQ(16, 4, update=EMAUpdate(0.5))), FORMS[form], calls=2, compiled=True, steps=1)


def test_a_checkpoint_in_a_compiled_function():
    torch._dynamo.reset()
    form = FORMS["not reentrant"]
    check(Block(both()), lambda run: torch.compile(form(run), backend="aot_eager"), calls=2, steps=1)


def test_inputs_without_gradient():
    check(Block(both()), FORMS["not reentrant"], calls=2, requires_grad=False)


def test_equal_inputs_of_two_calls():
    """The codes differ, so which call is run again matters: the last first, as in a backward pass."""
    block, x = Block(both()), torch.randn(5, 6, 4)
    other = copy.deepcopy(block)
    gradients = []
    for module, run in ((block, block), (other, FORMS["not reentrant"](other))):
        torch.manual_seed(1)
        (run(x) + run(x)).backward()
        gradients.append(module.before.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_second_backward_pass_through_one_graph():
    vq, x = FastChannelVQ(16, 4, update=EMAUpdate(0.5)), torch.randn(5, 6, 4, requires_grad=True)
    loss = checkpoint(lambda x: vq(x).loss, x, use_reentrant=False)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and vq.count.sum() == 30


def test_a_recomputation_that_comes_too_late_is_an_error():
    vq, x = FastChannelVQ(16, 4, update=EMAUpdate(0.5)), torch.randn(5, 6, 4, requires_grad=True)
    losses = [checkpoint(lambda x: vq(x).loss, x, use_reentrant=False)]
    with torch.no_grad():
        for _ in range(16):
            vq(torch.randn(4, 6, 4))
    with pytest.raises(RuntimeError, match="recomputation: expected one of the last 16 training calls"):
        losses[0].backward()


def test_nothing_is_kept_without_a_checkpoint():
    vq, x = FastChannelVQ(16, 4, update=EMAUpdate(0.5)), torch.randn(5, 6, 4, requires_grad=True)
    vq(x).loss.backward()
    assert not vq._memory.calls
