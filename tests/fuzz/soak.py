"""Hold every CPU search to the contract over billions of pairs: no wrong index, or exit status 1 and a problem's seed.

    python -m tests.fuzz.soak [--pairs 1e10] [--seed 0] [--threads 2]

Each problem (benchmarks/adversaries.py) is answered by D over all codes in benchmarks/exhaustive.cpp, which shares no
code with the library, and which plain torch checks in turn on a sample of the queries.  Compared with it:
`nearest_code` with all threads, and with one and the queries in another order; a `CodebookIndex`, and the same one
refit to other codes, searched, and refit back; on some problems `AutomaticIndex` until it has built a tree, and every
instruction set's clone that this machine runs of both searches (through the tests' window, if it was built).  A pair is
counted once, however many compare it.
"""

import argparse
import collections
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.rows import RESULTS, provenance, write
from benchmarks.tables import read
from revq_kernels import CodebookIndex, native, nearest_code
from revq_kernels.automatic import LEAST_CODES, LEAST_ROWS, AutomaticIndex
from revq_kernels.testing.exhaustive import exhaustive as plain
from tests.fuzz import adversarial_problems as adversaries
from tests.fuzz.compiled import exhaustive

MOST_PAIRS, MOST_WORK = 1 << 27, 1 << 31
SAMPLE_PAIRS = 1 << 15
CLONES_EVERY, AUTOMATIC_EVERY, AUTOMATIC_CALLS = 4, 2, 30
CLONE_PAIRS, AUTOMATIC_PAIRS = 1 << 23, 1 << 24
PROGRESS_S = 10.0


class WrongIndexError(SystemExit):
    """Ends the run with exit status 1."""


class Soak:
    """What was compared so far."""

    def __init__(self, threads: int) -> None:
        self.threads, self.pairs, self.problems = threads, 0, 0
        self.compared: collections.Counter[str] = collections.Counter()

    def check(self, problem: adversaries.Problem) -> None:
        """All searches on one problem.

        Raises:
            WrongIndexError: at the first wrong index.
        """
        x, codebook = problem.x, problem.codebook
        truth = exhaustive(x, codebook, self.threads)
        rows = torch.randperm(len(x))[: max(1, SAMPLE_PAIRS // (codebook.shape[0] * codebook.shape[1]))]
        self._same(problem, "plain torch, sampled", plain(x[rows], codebook).index, truth[rows], rows)
        self._same(problem, "native", nearest_code(x, codebook, impl="native"), truth)
        self._one_thread(problem, truth)
        index = CodebookIndex(codebook)
        self._same(problem, "index", index.nearest_code(x), truth)
        index.refit((codebook.roll(7, 1).float() * -1.01).to(codebook.dtype))
        index.nearest_code(x[:32])
        index.refit(codebook)
        self._same(problem, "index, refit", index.nearest_code(x), truth)
        if self.problems % CLONES_EVERY == 0 and problem.finite:
            self._clones(problem, truth)
        may_grow = codebook.shape[1] >= LEAST_CODES and len(x) >= LEAST_ROWS and problem.pairs <= AUTOMATIC_PAIRS
        if may_grow and self.problems % AUTOMATIC_EVERY == 0:
            self._automatic(problem, truth)
        self.pairs += problem.pairs
        self.problems += 1

    def _one_thread(self, problem: adversaries.Problem, truth: Tensor) -> None:
        order = torch.randperm(len(problem.x))
        torch.set_num_threads(1)
        try:
            found = nearest_code(problem.x[order], problem.codebook, impl="native")
        finally:
            torch.set_num_threads(self.threads)
        self._same(problem, "native, 1 thread, permuted", found, truth[order], order)

    def _automatic(self, problem: adversaries.Problem, truth: Tensor) -> None:
        automatic = AutomaticIndex()
        for _ in range(AUTOMATIC_CALLS):
            self._same(problem, "automatic", automatic.nearest_code(problem.x, problem.codebook), truth)
            if automatic.index is not None:
                self._same(problem, "automatic, tree", automatic.nearest_code(problem.x, problem.codebook), truth)
                break

    def _clones(self, problem: adversaries.Problem, truth: Tensor) -> None:
        try:
            from revq_kernels import _dev
        except ImportError:
            return
        codes = problem.codebook[0].float().contiguous()
        count = max(1, CLONE_PAIRS // len(codes))
        queries, expected = problem.x[:count, 0].float().contiguous(), truth[:count, :1]
        arrays = torch.ops.revq.index_build(codes[None])
        panels, ids, boxes, walkable = (array[0].numpy() for array in arrays)
        for isa in range(_dev.cpu_isa() + 1):
            name = native.ISA_NAMES[isa]
            found = _dev.search(isa, queries.numpy(), codes.numpy(), codes.mean(0).nan_to_num(0, 0, 0).numpy())[0]
            self._same(problem, f"clone {name}", torch.from_numpy(found)[:, None], expected)
            walked, scanned = _dev.run_index(isa, queries.numpy(), panels, ids, boxes, len(codes))
            self._same(problem, f"index scan {name}", torch.from_numpy(scanned).long()[:, None], expected)
            if bool(walkable):
                self._same(problem, f"index walk {name}", torch.from_numpy(walked).long()[:, None], expected)

    def _same(
        self, problem: adversaries.Problem, what: str, got: Tensor, truth: Tensor, rows: Tensor | None = None
    ) -> None:
        self.compared[what] += truth.numel() * problem.codebook.shape[1]
        wrong = (got != truth).nonzero()
        if len(wrong):
            n, g = wrong[0].tolist()
            query = n if rows is None else int(rows[n])
            raise WrongIndexError(
                f"WRONG: {what}: {len(wrong)} of {truth.numel()} indices, the first at query {query}, group {g}: got "
                f"{got[n, g].item()}, expected {truth[n, g].item()}.  {problem}"
            )


def append(row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Add a row to the soak's file; one whose columns have changed is started anew."""
    old = read("soak-cpu", folder) if (folder / "soak-cpu.csv").exists() else []
    write("soak-cpu", [*(r for r in old if list(r) == list(row)), row], folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak")
    parser.add_argument("--pairs", type=float, default=1e10)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; the others follow by number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--problems", type=int, default=1 << 40, help="at most so many: --problems 1 repeats one")
    parser.add_argument("--most-pairs", type=float, default=MOST_PAIRS, help="in one problem")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    native.require()
    torch.set_num_threads(options.threads)
    soak, start, shown = Soak(options.threads), time.monotonic(), time.monotonic()
    wrong = None
    while wrong is None and soak.pairs < options.pairs and soak.problems < options.problems:
        try:
            seed = options.seed + soak.problems
            soak.check(adversaries.problem(seed, int(options.most_pairs), MOST_WORK))
        except WrongIndexError as error:
            wrong = error
        now = time.monotonic()
        if now - shown > PROGRESS_S:
            shown, rate = now, soak.pairs / (now - start)
            print(f"{soak.pairs:.3g} pairs, {soak.problems} problems, {rate:.3g} pairs/s, 0 wrong", flush=True)
    seconds = time.monotonic() - start
    compared = "; ".join(f"{name} {pairs:.3g}" for name, pairs in soak.compared.items())
    row = {"pairs": f"{soak.pairs:.4g}", "problems": soak.problems, "wrong": 0 if wrong is None else str(wrong)}
    row |= {"seed": options.seed, "seconds": round(seconds), "compared": compared, "isa": native.isa()}
    append(row | provenance("python -m tests.fuzz.soak"), options.out)
    print(f"{soak.pairs:.4g} pairs, {soak.problems} problems, {seconds:.0f} s; pairs compared: {compared}", flush=True)
    if wrong is not None:
        raise wrong


if __name__ == "__main__":
    main()
