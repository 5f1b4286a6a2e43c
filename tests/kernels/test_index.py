"""`CodebookIndex`: the contract's index on every problem, before and after refits; visit counts; memory."""

import math
import threading

import pytest
import torch

from revq_kernels import CodebookIndex, NativeUnavailableError, native, nearest_code
from revq_kernels.index import BUILD_VISITS, tree_pays
from revq_kernels.testing.problems import Problem, assert_same_codes, contract_index, problems

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}")
PROBLEMS = list(problems(seed=1))
dev = pytest.importorskip("revq_kernels._dev", reason="the tests' window is built with REVQ_DEV=1")


@pytest.fixture(params=PROBLEMS, ids=[p.name for p in PROBLEMS])
def problem(request) -> Problem:
    return request.param


def moved(codebook):
    """Other codes of the same shape and kind: rolled, mirrored and stretched a little."""
    return (codebook.roll(7, 1).float() * -1.01).to(codebook.dtype)


def test_index_is_the_contracts(problem):
    index = CodebookIndex(problem.codebook)
    assert_same_codes(index.nearest_code(problem.x), problem.x, problem.codebook)


def test_after_a_refit_it_is_the_new_codes(problem):
    index = CodebookIndex(moved(problem.codebook))
    index.refit(problem.codebook)
    assert index.rebuilds == 0
    assert_same_codes(index.nearest_code(problem.x), problem.x, problem.codebook)


@pytest.mark.parametrize("isa", range(dev.cpu_isa() + 1))
def test_every_isa_clone_gives_the_contracts_index(isa):
    walked = 0
    for name, x, codebook in PROBLEMS:
        queries, codes = x.float().reshape(-1, *x.shape[-2:])[:, 0], codebook[:1].float()
        panels, ids, boxes, finite = (array[0].numpy() for array in torch.ops.revq.index_build(codes.contiguous()))
        chosen, scanned = dev.run_index(isa, queries.contiguous().numpy(), panels, ids, boxes, codes.shape[1])
        expected = contract_index(queries[:, None], codes)[:, 0]
        assert torch.equal(torch.from_numpy(scanned).long(), expected), name
        may_walk = queries.isfinite().all(1) & bool(finite)
        assert torch.equal(torch.from_numpy(chosen).long()[may_walk], expected[may_walk]), name
        walked += int(may_walk.sum())
    assert walked > 1500
    with pytest.raises(ValueError, match="no such clone"):
        dev.run_index(dev.cpu_isa() + 1, queries.contiguous().numpy(), panels, ids, boxes, codes.shape[1])


@pytest.mark.parametrize("num_codes", [1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 70001])
@pytest.mark.parametrize("d", [1, 3, 4, 8, 16])
def test_trees_of_every_depth(num_codes, d):
    """One to five levels, full and partly full; more queries than walk together; more than one group."""
    codebook = torch.randn(2, num_codes, d).mul(8).round().div(8)  # many ties
    x = torch.randn(70, 2, d).mul(8).round().div(8)
    index = CodebookIndex(codebook)
    assert torch.equal(index.nearest_code(x), nearest_code(x, codebook))
    ids = index._arrays[1].reshape(2, -1)
    assert torch.equal(ids[:, :num_codes].sort(dim=1).values, torch.arange(num_codes).int().expand(2, -1))
    assert bool((ids[:, num_codes:] == ids[:, num_codes - 1 : num_codes]).all())


def test_pending_lists_that_overflow():
    """Queries with nearly equal distances to all codes: all leaves are pending, many times what the lists hold."""
    angle = torch.arange(20000.0) * (2 * math.pi / 20000)
    codebook = torch.stack([angle.cos(), angle.sin()], dim=1)[None]  # a circle around the queries
    x = torch.randn(64, 1, 2) * 1e-4
    index = CodebookIndex(codebook)
    assert torch.equal(index.nearest_code(x), nearest_code(x, codebook))
    assert index.last.leaves > 20 * dev.MAX_PENDING


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_thread_count_batch_and_order(threads):
    x, codebook = torch.randn(301, 2, 8), torch.randn(2, 3000, 8).repeat(1, 2, 1)
    expected = contract_index(x, codebook)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        index = CodebookIndex(codebook)
        assert torch.equal(index.nearest_code(x), expected)
        assert torch.equal(torch.cat([index.nearest_code(piece) for piece in x.split(37)]), expected)
        order = torch.randperm(301)
        assert torch.equal(index.nearest_code(x[order]), expected[order])
        reference = [array.clone() for array in index._arrays]
        torch.set_num_threads(1)
        assert all(map(torch.equal, CodebookIndex(codebook)._arrays, reference)), "the tree depends on the threads"
    finally:
        torch.set_num_threads(before)


def test_denormals_count_even_when_torch_flushes_them():
    x, codebook = torch.randn(500, 1, 4) * 1e-20, torch.randn(1, 5000, 4) * 1e-20
    expected = contract_index(x, codebook)
    assert torch.set_flush_denormal(True)
    try:
        index = CodebookIndex(codebook)
        index.refit(codebook)
        found = index.nearest_code(x)
        still_flushes = bool(torch.tensor(1e-38) * 0.01 == 0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)
    assert still_flushes, "the caller's mode was not restored"


@pytest.mark.parametrize("d", [8, 9])
def test_leaves_that_are_written_past_the_caches(d):
    """Panels of more than 6 MB, in whole registers (d = 8) and with elements left over."""
    generator = torch.Generator().manual_seed(d)
    codebook = torch.randn(2, 100_003, d, generator=generator)
    x = torch.randn(40, 2, d, generator=generator)
    arrays = list(torch.ops.revq.index_build(codebook))
    codebook = codebook.roll(1, -1).mul_(1.5)
    shifted = torch.empty(arrays[0].numel() + 1)[1:].view(arrays[0].shape)  # not aligned to a register
    for panels in (arrays[0], shifted):
        torch.ops.revq.index_refit_(panels, *arrays[1:], codebook)
        rows = panels.transpose(2, 3).reshape(2, -1, d)  # in the order of the leaves
        expected = codebook.gather(1, arrays[1].reshape(2, -1, 1).long().expand(-1, -1, d))
        assert torch.equal(rows, expected)
        found, _ = torch.ops.revq.index_search(x, panels, *arrays[1:], codebook.shape[1])
        assert torch.equal(found, nearest_code(x, codebook))


def test_it_owns_its_codes():
    codebook, x = torch.randn(3, 4097, 5), torch.randn(40, 3, 5)
    index, expected = CodebookIndex(codebook), nearest_code(x, codebook)
    codebook.zero_()
    assert torch.equal(index.nearest_code(x), expected)


def test_non_finite_groups_and_queries_alone_go_to_all_codes():
    x, codebook = torch.randn(40, 2, 4), torch.randn(2, 1000, 4)
    index = CodebookIndex(codebook)
    index.nearest_code(x)
    assert index.last.scanned == 0 and index.last.queries == 80
    x[5, 1, 2], x[7, 0, 0] = float("inf"), float("nan")
    assert torch.equal(index.nearest_code(x), contract_index(x, codebook))
    assert index.last.scanned == 2
    codebook[0, 99, 3] = -float("inf")
    index.refit(codebook)
    assert torch.equal(index.nearest_code(x), contract_index(x, codebook))
    assert index.last.scanned == 41
    codebook[0, 99, 3] = 0.0
    index.refit(codebook)
    index.nearest_code(x)
    assert index.last.scanned == 2, "finite again"


def test_visit_counts():
    x, codebook = torch.randn(200, 2, 4), torch.randn(2, 16384, 4)
    index = CodebookIndex(codebook)
    assert math.isnan(index.visited) and index.leaves == 1024
    index.nearest_code(x[:0])
    assert math.isnan(index.visited)
    index.nearest_code(x)
    assert 16 / 16384 <= index.visited < 0.02
    assert index.last == index._visits and index.last.cost == index.last.leaves + 2 * index.last.blocks
    index.nearest_code(x * float("nan"))
    assert index.visited > 0.5 and "visited=" in repr(index)


def test_refit_rebuilds_when_old_splits_have_cost_as_much_as_a_build():
    x, codebook = torch.randn(512, 1, 4), torch.randn(1, 4096, 4)
    index = CodebookIndex(codebook)
    index.nearest_code(x)
    fresh = index.visited
    for _ in range(50):
        index.refit(codebook + 1e-5 * torch.randn_like(codebook))
        index.nearest_code(x)
    assert index.rebuilds == 0, "boxes that still fit cost nothing"
    other, steps = codebook[:, torch.randperm(4096)], 0  # the old splits fit none of the new codes
    while index.rebuilds == 0:
        index.refit(other)
        assert torch.equal(index.nearest_code(x), nearest_code(x, other))
        steps += 1
        if index.rebuilds == 0:
            assert index.visited > 10 * fresh
    spent = (steps - 1) * 512 * 256  # at most all leaves each time
    assert spent + 512 * 256 >= BUILD_VISITS * 256 * 8 and steps < 10
    assert index.visited < 2 * fresh
    index.refit(other)
    assert index.rebuilds == 1


@pytest.mark.parametrize(("d", "most"), [(1, 2.2), (2, 2.2), (3, 2.2), (4, 1.5), (8, 1.5), (64, 1.5)])
@pytest.mark.parametrize("num_codes", [1024, 16384, 100001])
def test_memory(d, num_codes, most):
    codebook = torch.randn(1, num_codes, d)
    assert CodebookIndex(codebook).nbytes <= most * codebook.nbytes


def test_compiled_exported_and_in_inference_mode():
    x, codebook = torch.randn(50, 2, 4), torch.randn(2, 3000, 4)
    with torch.inference_mode():
        index = CodebookIndex(codebook.clone())
        expected = index.nearest_code(x)
    assert torch.equal(expected, nearest_code(x, codebook))
    compiled = torch.compile(lambda x: index.nearest_code(x * 1.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    index.refit(codebook * 2)  # of arrays that were made in inference mode
    assert torch.equal(compiled(x), nearest_code(x, codebook * 2))
    check = torch.library.opcheck
    check(torch.ops.revq.index_search.default, (x, *index._arrays, 3000))
    check(torch.ops.revq.index_refit_.default, (*index._arrays, codebook), test_utils=("test_schema",))
    check(torch.ops.revq.index_build.default, (codebook,), test_utils=("test_schema",))


def test_searches_may_run_side_by_side():
    x, codebook = torch.randn(2000, 2, 4), torch.randn(2, 5000, 4)
    index, expected, wrong = CodebookIndex(codebook), nearest_code(x, codebook), []

    def search():
        for _ in range(20):
            if not torch.equal(index.nearest_code(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_and_queries_that_require_one():
    x, codebook = torch.randn(5, 1, 4, requires_grad=True), torch.randn(1, 50, 4, requires_grad=True)
    assert not CodebookIndex(codebook).nearest_code(x).requires_grad


CODEBOOK = torch.zeros(3, 40, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: CodebookIndex(CODEBOOK[0]), ValueError, r"codebook: expected \[G, K, d\], got shape \(40, 4\)"),
        (lambda i: CodebookIndex(CODEBOOK.double()), TypeError, r"codebook: expected dtype float32"),
        (lambda i: CodebookIndex(CODEBOOK[:, :0]), ValueError, r"codebook: expected 1 <= K"),
        (lambda i: CodebookIndex(CODEBOOK.to("meta")), ValueError, r"codebook: expected a CPU tensor, got one on meta"),
        (lambda i: i.refit(CODEBOOK[:, 1:]), ValueError, r"expected the index's shape \(3, 40, 4\), got \(3, 39, 4\)"),
        (
            lambda i: i.nearest_code(CODEBOOK),
            ValueError,
            r"x: expected \[\.\.\., G=3, d=4\] for an index .* \(3, 40, 4\)$",
        ),
        (lambda i: i.nearest_code(torch.zeros(4)), ValueError, r"x: expected \[\.\.\., G=3, d=4\]"),
        (lambda i: i.nearest_code(torch.zeros(3, 4).long()), TypeError, r"x: expected dtype float32"),
        (lambda i: i.nearest_code([1.0]), TypeError, r"x: expected a torch.Tensor, got list"),
        (
            lambda i: i.nearest_code(torch.zeros(3, 4, device="meta")),
            ValueError,
            r"x: expected a CPU tensor, as the index",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(CodebookIndex(CODEBOOK))


def test_direct_operator_calls_do_not_read_outside_their_tensors():
    x, codebook = torch.randn(5, 2, 4), torch.randn(2, 40, 4)
    ops = torch.ops.revq
    panels, ids, boxes, finite = ops.index_build(codebook)
    far = ids.clone()
    far[1, 2, 3] = 40
    for call in (
        lambda: ops.index_build(codebook.double()),
        lambda: ops.index_build(codebook.transpose(0, 1)),
        lambda: ops.index_build(codebook[:, :0].contiguous()),
        lambda: ops.index_search(x, panels, ids, boxes, finite, 1000),
        lambda: ops.index_search(x, panels[:1], ids, boxes, finite, 40),
        lambda: ops.index_search(x[:, :1], panels, ids, boxes, finite, 40),
        lambda: ops.index_search(x, panels, ids.long(), boxes, finite, 40),
        lambda: ops.index_refit_(panels, far, boxes, finite, codebook),
        lambda: ops.index_refit_(panels, far * 0 - 1, boxes, finite, codebook),
        lambda: ops.index_refit_(panels, ids, boxes, finite, codebook[:, :20].contiguous()),
        lambda: ops.index_refit_(panels, ids, boxes, finite, codebook[:1]),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_without_the_library_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    with pytest.raises(NativeUnavailableError, match="is not built"):
        CodebookIndex(CODEBOOK)


@pytest.mark.parametrize(
    ("codes", "dim", "queries", "pays"),
    [(16384, 4, 8192, True), (16384, 4, 8191, False), (4096, 4, 10**6, False), (65536, 16, 10**6, False)],
)
def test_the_rule_of_thumb_for_a_tree(codes, dim, queries, pays):
    assert tree_pays(codes, dim, queries) is pays
