"""Two processes train as one does on the joined batch, with equal bits in both.

One pair of processes runs all cases; each case is a function that the parent runs alone on the joined batch as well.
"""

import datetime
import multiprocessing
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from revq_kernels import EMAUpdate, FastChannelVQ, MappedCodes, ProjectedVQ, ReplaceDeadCodes, ResidualVQ

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

ALONE = SimpleNamespace(rank=None, group="auto")


def part(where, x, first=3):
    """The rows of x ``[B, ...]`` for a process: the first ones for rank 0, the rest for rank 1, all for the parent."""
    return x if where.rank is None else (x[:first], x[first:])[where.rank]


def batches(steps=3, rows=8):
    return torch.randn(steps, rows, 6, 4, generator=torch.Generator().manual_seed(7))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def seeded(where, make):
    """A module of equal codes everywhere; the draws that follow differ by process."""
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(5 if where.rank is None else where.rank)
    return module


def averages(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, num_groups=2, update=EMAUpdate(0.8)))
    for x in batches():
        vq(part(where, x))
    return state(vq)


def residual(where):
    vq = seeded(where, lambda: ResidualVQ([FastChannelVQ(12, 4, update=EMAUpdate(0.8)) for _ in range(2)]))
    for x in batches():
        vq(part(where, x))
    return state(vq)


def projected(where):
    """The statistics are of the projected vectors."""
    vq = seeded(where, lambda: ProjectedVQ(4, FastChannelVQ(12, 2, metric="cosine", update=EMAUpdate(0.8))))
    for x in batches():
        vq(part(where, x))
    return state(vq)


def no_rows(where):
    """Rank 0 has no row in any step, and every row of rank 1 is masked in the last."""
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8)))
    *some, last = batches()
    for x in some:
        vq(part(where, x, first=0))
    vq(part(where, last, first=0), mask=part(where, torch.zeros(8, 1, dtype=torch.bool), first=0))
    return state(vq)


def not_finite(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8)))
    for x in batches():
        x[0, 0], x[-1, 2, 1] = float("nan"), float("inf")
        with pytest.warns(UserWarning, match="expected finite vectors") if not vq.skipped.number else nothing():
            vq(part(where, x))
    return state(vq)


def nothing():
    return torch.no_grad()


def counts_and_reset(where):
    vq = seeded(where, lambda: FastChannelVQ(40, 4))
    for x in batches():
        vq(part(where, x))
    count = vq.count.clone()
    moved = vq.reset_(noise=0.0)
    return {"count": count, "moved": moved, **state(vq)}


def reset_with_noise(where):
    """The noise is drawn by each process's own generator."""
    vq = seeded(where, lambda: FastChannelVQ(40, 4, update=EMAUpdate(0.8)))
    vq(part(where, batches()[0]))
    moved = vq.reset_(noise=0.1)
    return {"moved": moved, "different": state(vq) | {"noise": torch.randn(3)}}


def initialization(where):
    vq = seeded(where, lambda: FastChannelVQ(20, 4, num_groups=2, update=EMAUpdate(0.8)))
    x = batches()[0]
    x[0, 1] = float("nan")
    with pytest.warns(UserWarning, match="finite vectors") if where.rank != 1 else nothing():
        vq.initialize_(part(where, x), iterations=3, generator=torch.Generator().manual_seed(2))
    return state(vq)


def initialization_of_a_rank_without_rows(where):
    vq = seeded(where, lambda: FastChannelVQ(40, 4))
    vq.initialize_(part(where, batches()[0], first=0), generator=torch.Generator().manual_seed(2))
    return state(vq)


def dead_codes(where):
    """Rank 0 has fewer rows than there are dead codes; what replaces them is drawn from the rows of both."""
    update = EMAUpdate(0.8)
    vq = seeded(where, lambda: FastChannelVQ(30, 4, dead_codes=ReplaceDeadCodes(every=2), update=update))
    with torch.no_grad():
        vq.codebook[:, 4:] += 100
    vq.update.restart_(vq.codebook, torch.ones_like(vq.count, dtype=torch.bool))
    for x in batches():
        vq(part(where, x, first=1))
    vq.update.embed_sum.zero_()
    return {"moved": vq.dead_codes.moved.clone(), "count": vq.count.sum(), "different": state(vq)}


def dead_codes_are_rows(where):
    vq = seeded(where, lambda: FastChannelVQ(60, 4, dead_codes=ReplaceDeadCodes(every=1)))
    with torch.no_grad():
        vq.codebook[:, 2:] += 100
    x = batches()[0]
    for _ in range(2):
        vq(part(where, x))
    moved = vq.codebook[vq.dead_codes.moved]
    nearest = torch.cdist(moved, x.reshape(-1, 4), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    return {
        "moved": vq.dead_codes.moved.clone(),
        "rows": nearest.values,
        "distinct": torch.tensor(len(nearest.indices.unique())),
        "different": {"codebook": vq.codebook.detach().clone()},
    }


def alone(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8), process_group=None))
    vq(part(where, batches()[0]))
    rows = part(where, batches()[0]).numel() // 4
    return {"exchanges": 0, "only its own rows": torch.tensor(int(vq.count.sum()) == rows)}


def subgroup(where):
    """A group of both, and one of each process alone."""
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8), process_group=where.group))
    for x in batches():
        vq(part(where, x))
    return state(vq)


def recomputation(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8), dead_codes=ReplaceDeadCodes(every=99)))
    for reentrant in (False, True):
        x = part(where, batches()[0]).clone().requires_grad_()
        checkpoint(vq, x, use_reentrant=reentrant)[2].backward()
    return {"exchanges": 2 * (1 + 2), **state(vq)}


def compiled(where):
    torch._dynamo.reset()
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8), process_group=where.group))
    run = torch.compile(vq, fullgraph=True, backend="aot_eager")
    for x in batches():
        run(part(where, x))
    return state(vq)


def evaluation(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8), dead_codes=ReplaceDeadCodes())).eval()
    vq(part(where, batches()[0]))
    vq.train().encode(part(where, batches()[0]))
    return {"exchanges": 0, **state(vq)}


def exchanges_per_step(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, update=EMAUpdate(0.8)))
    for x in batches():
        vq(part(where, x))
    return {"exchanges": 3, "count": vq.count.clone()}


def mapped(where):
    vq = seeded(where, lambda: FastChannelVQ(12, 4, codes=MappedCodes(torch.randn(12, 4), torch.nn.Linear(4, 4))))
    vq(part(where, batches()[0]))
    return state(vq)


def data_parallel(where):
    """The codes of an optimizer's step and the averages of another quantizer, through DistributedDataParallel."""

    def make():
        learned = FastChannelVQ(12, 4, dead_codes=ReplaceDeadCodes(every=99))
        return torch.nn.Sequential(
            torch.nn.Linear(4, 4), ResidualVQ([learned, FastChannelVQ(12, 4, update=EMAUpdate())])
        )

    module = seeded(where, make)
    run = module if where.rank is None else torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        run(part(where, x, first=4)).loss.backward()
        optimizer.step()
    return state(module)


def sharded(where):
    """Averages of a shard are an error; averages of a codebook that is left whole are not."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def make():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), FastChannelVQ(12, 4, update=EMAUpdate(0.8)))

    module, codebook_only = seeded(where, make), seeded(where, lambda: FastChannelVQ(12, 4))
    if where.rank is not None:
        for refused in (seeded(where, make), FastChannelVQ(8, 4, dead_codes=ReplaceDeadCodes())):
            with pytest.raises(ValueError, match="codebook: expected a whole tensor"):
                fully_shard(refused)
        fully_shard(module, ignored_params={module[1].codebook})
        fully_shard(codebook_only)
        with pytest.raises(ValueError, match="codebook: expected a whole tensor"):
            codebook_only.reset_()
    for x in batches():
        module(part(where, x, first=4)).loss.backward()
        codebook_only(part(where, x, first=4))
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in module.state_dict().items()}
    return {**whole, "plain count": codebook_only.count.clone()}


CASES = [
    averages, residual, projected, no_rows, not_finite, counts_and_reset, reset_with_noise, initialization,
    initialization_of_a_rank_without_rows, dead_codes, dead_codes_are_rows, alone, subgroup, recomputation, compiled,
    evaluation, exchanges_per_step, mapped, data_parallel, sharded,
]  # fmt: skip


def run_cases(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    where = SimpleNamespace(rank=rank, group=dist.new_group([0, 1]))
    calls, exchange = [], dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(1)
        return exchange(*args, **kwargs)

    dist.all_reduce = counted
    found = {}
    for case in CASES:
        calls.clear()
        try:
            found[case.__name__] = case(where)
            if found[case.__name__].get("exchanges", False) is not False:
                found[case.__name__]["exchanges"] = len(calls)
        except Exception:  # reported by the case's test; the other process would wait for the rest
            found[case.__name__] = traceback.format_exc()
    torch.save(found, results[rank])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all cases on both ranks."""
    folder = tmp_path_factory.mktemp("processes")
    results = [folder / f"{rank}.pt" for rank in range(2)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_cases, args=(rank, folder / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=400)  # on a busy machine; a hang would end by the timeout of gloo
    return [torch.load(path) for path in results]


def leaves(found):
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.filterwarnings("ignore:x. expected finite vectors")
@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_two_processes_are_one(pair, case):
    first, second = (found[case.__name__] for found in pair)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    torch.manual_seed(0)
    expected = case(ALONE)
    assert leaves(first).keys() == leaves(second).keys() == leaves(expected).keys()
    for name, value in leaves(first).items():
        assert torch.equal(value, second[name]), f"{name}: other bits on rank 1"
        torch.testing.assert_close(
            value, expected[name], rtol=2e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, value in first.get("different", {}).items():  # equal in both processes, but drawn
        assert name == "noise" or torch.equal(value, second["different"][name]), f"{name}: other bits on rank 1"
    if "exchanges" in expected:
        assert first["exchanges"] == second["exchanges"] == expected["exchanges"]


def test_codes_that_replace_are_rows_of_both_processes(pair):
    found = pair[0]["dead_codes_are_rows"]
    assert found["moved"].sum() >= 48 and found["distinct"] == 48 and (found["rows"] == 0).all()


def test_the_group():
    with pytest.raises(ValueError, match=r"process_group: expected 'auto', None or a group"):
        FastChannelVQ(8, 4, process_group="world")
    with pytest.raises(ValueError, match=r"process_group: expected 'auto', None or a group"):
        FastChannelVQ(8, 4, process_group=-100)  # dist.GroupMember.NON_GROUP_MEMBER
