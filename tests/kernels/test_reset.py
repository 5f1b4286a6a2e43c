"""Non-activation reset against a restatement in loops, and the paper's 2-D toy."""

import numpy as np
import pytest
import torch

from revq_kernels import FastChannelVQ, reset_codes_


def papers_pairs(count, max_fraction):
    """{target: source} of one group by Eq. 2: the codes by (count, index), the u-th takes the row of the u-th from the end."""
    k = len(count)
    order = sorted(range(k), key=lambda i: (count[i], i))
    r = min(sum(c == 0 for c in count), int(max_fraction * k))
    return {order[u]: order[k - 1 - u] for u in range(r) if count[order[k - 1 - u]] > 0}


def releases_pairs(count, max_fraction):
    """{target: source} of one group as the released code does it: sort by falling count, the last r become the first r."""
    falling = np.argsort(-np.asarray(count), kind="stable")
    r = min(int(max_fraction * len(count)), int((np.asarray(count) < 0.5).sum()))
    return dict(zip(falling[len(count) - r :].tolist(), falling[:r].tolist(), strict=True))


PAIRS = {"paper": papers_pairs, "release": releases_pairs}


def pairs(count, max_fraction, pairing):
    """{target: source} of one group, read from a codebook whose values are the numbers of its rows."""
    codebook = torch.arange(float(len(count))).reshape(1, -1, 1)
    counts = torch.tensor([count])
    moved = reset_codes_(codebook, counts, noise=0.0, max_fraction=max_fraction, pairing=pairing)
    return {code: int(codebook[0, code, 0]) for code in moved[0].nonzero()[:, 0].tolist()}


def test_pairs_of_the_release():
    counts = [5, 0, 9, 0, 7, 1, 0, 3, 2, 4]
    assert pairs(counts, 0.2, "release") == {3: 2, 6: 4}  # the last two dead codes, the busiest source first
    assert pairs(counts, 0.2, "paper") == {1: 2, 3: 4}
    assert pairs(counts, 1.0, "release") == pairs(counts, 1.0, "paper") == {1: 2, 3: 4, 6: 0}
    assert pairs([0, 2, 2, 0], 1.0, "release") == {0: 1, 3: 2}  # of equal counts the lower index first
    assert pairs([0, 2, 2, 0], 1.0, "paper") == {0: 2, 3: 1}
    assert pairs([0, 0, 0, 4], 1.0, "release") == {0: 3, 1: 0, 2: 1}  # a source may be dead
    assert pairs([0, 0, 0, 4], 1.0, "paper") == {0: 3}


def random_counts(rng, kind, k):
    if kind == "distinct":
        count = rng.permutation(np.arange(1, k + 1))
        count[rng.choice(k, rng.integers(0, k // 2 + 1), replace=False)] = 0
        return count
    return {"ties": rng.integers(0, 4, k), "few used": 7 * (rng.random(k) < 0.1), "all dead": np.zeros(k, int)}.get(
        kind, rng.integers(1, 9, k)
    )


@pytest.mark.parametrize("kind", ["distinct", "ties", "few used", "all dead", "none dead"])
def test_pairs_of_random_counts(kind):
    rng = np.random.default_rng(5)
    for _ in range(120):
        counts = random_counts(rng, kind, int(rng.integers(1, 60))).tolist()
        for max_fraction in (0.0, 0.2, 0.5, 1.0, float(rng.random())):
            got = {pairing: pairs(counts, max_fraction, pairing) for pairing in PAIRS}
            assert got == {pairing: by_hand(counts, max_fraction) for pairing, by_hand in PAIRS.items()}, counts
        if kind == "distinct":  # and no limit binds
            assert pairs(counts, 1.0, "release") == pairs(counts, 1.0, "paper")


@pytest.mark.parametrize("pairing", ["paper", "release"])
@pytest.mark.parametrize("max_fraction", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_partners(pairing, max_fraction, dtype):
    count = torch.randint(0, 4, (6, 23))
    count[0], count[1], count[2, :20] = 0, 5, 0  # all dead, none dead, mostly dead
    codebook = torch.randn(6, 23, 4).to(dtype)
    before, counted = codebook.clone(), count.clone()
    moved = reset_codes_(codebook, count, noise=0.0, max_fraction=max_fraction, pairing=pairing)
    expected = before.clone()
    expected_moved = torch.zeros(6, 23, dtype=torch.bool)
    for g in range(6):
        for target, source in PAIRS[pairing](count[g].tolist(), max_fraction).items():
            expected[g, target] = before[g, source]
            expected_moved[g, target] = True
    assert torch.equal(codebook, expected)
    assert torch.equal(moved, expected_moved)
    assert torch.equal(count, counted), "count is left as it is"


def test_noise_is_drawn_for_moved_rows_only_in_their_order():
    count = torch.tensor([[0, 3, 0, 9], [1, 1, 1, 0]])
    codebook = torch.arange(32.0).reshape(2, 4, 4)
    expected = codebook.clone()
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    for row, (group, target, source) in enumerate([(0, 0, 3), (0, 2, 1), (1, 3, 2)]):
        expected[group, target] = codebook[group, source] + 0.5 * noise[row]
    moved = reset_codes_(codebook, count, noise=0.5, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(codebook, expected, rtol=0, atol=1e-6)
    assert moved.nonzero().tolist() == [[0, 0], [0, 2], [1, 3]]


def test_one_code_and_no_dead_codes_change_nothing():
    codebook = torch.randn(1, 1, 3)
    before = codebook.clone()
    assert not reset_codes_(codebook, torch.zeros(1, 1, dtype=torch.int64)).any()
    assert not reset_codes_(codebook, torch.ones(1, 1, dtype=torch.int64)).any()
    assert torch.equal(codebook, before)


def test_a_parameter_can_be_reset():
    vq = FastChannelVQ(8, 2)
    vq(torch.zeros(1, 5, 2))
    moved = vq.reset_(noise=0.01)
    assert moved.sum() == 1, "one code was chosen, so it can lend its place to one dead code"
    assert vq.count.sum() == 0


def test_two_dimensional_toy_of_figure_8():
    """Without reset at most half of the codes are ever used; with it all are, at less than a third of the error."""

    def run(reset: bool) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        centers = torch.rand(16, 2, generator=generator) * 10 - 5
        data = (centers[:, None] + 0.1 * torch.randn(16, 64, 2, generator=generator)).reshape(1, -1, 2)
        vq = FastChannelVQ(16, 2, estimator="none", commitment=0.0)
        with torch.no_grad():
            vq.codebook.copy_(torch.tensor([9.0, 9.0]) + 0.1 * torch.randn(1, 16, 2, generator=generator))
        optimizer = torch.optim.Adam(vq.parameters(), lr=0.2)
        for epoch in range(40):
            vq.count.zero_()
            for _ in range(20):
                optimizer.zero_grad()
                vq(data).loss.backward()
                optimizer.step()
            if reset and epoch < 35:
                moved = vq.reset_(noise=0.1, generator=generator)
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[vq.codebook][key][moved] = 0
        vq.count.zero_()
        error = vq(data).loss.item()
        return vq.utilization.item(), error

    used_without, error_without = run(reset=False)
    used_with, error_with = run(reset=True)
    assert used_without <= 0.5
    assert used_with == 1.0
    assert error_with < error_without / 3
