"""Compare every CPU search with the contract over billions of pairs; a wrong index prints its problem's seed.

    python -m tests.fuzz.soak [--pairs 1e10] [--seed 0] [--threads 2]

Each problem (adversarial_problems.py) is searched exhaustively by exhaustive.cpp, which shares no code with the library
and is itself compared with plain torch on a sample of the queries.  Compared with it: `nearest_code` with all threads,
and with one thread and the queries in another order; a `CodebookIndex`, before and after a refit to other codes and
back; and, on some problems, every instruction set's clone of both searches that this machine can run (through the
development library, if it was built).  The count of pairs does not depend on the number of comparisons.  The first
wrong index ends the run with exit status 1.
"""

import argparse
import collections
import ctypes
import functools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]  # when the file is run by its path

from benchmarks.harness.machine import build  # noqa: E402
from benchmarks.harness.rows import RESULTS, Row, provenance, read, write  # noqa: E402
from revq_kernels import CodebookIndex, native, nearest_code  # noqa: E402
from revq_kernels.testing.exhaustive import exhaustive_search  # noqa: E402
from tests.fuzz.adversarial_problems import Problem, problem  # noqa: E402

MOST_PAIRS, MOST_WORK = 1 << 27, 1 << 31
"""Of one problem: query-code pairs, and pairs times d."""
SAMPLE_PAIRS = 1 << 15
"""Pairs of one problem that plain torch searches."""
CLONES_EVERY, CLONE_PAIRS = 4, 1 << 23
"""Every so many problems, so many pairs are searched by every clone."""
PROGRESS_S = 10.0


class WrongIndexError(SystemExit):
    """Ends the run with exit status 1."""


@functools.cache
def _compiled() -> ctypes.CDLL:
    loaded = build(Path(__file__).with_name("exhaustive.cpp"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.exhaustive.argtypes = [pointer, pointer, number, number, number, number, number, pointer]
    loaded.exhaustive.restype = None
    return loaded


def compiled_search(x: Tensor, codebook: Tensor, threads: int) -> Tensor:
    """Exhaustive search of x ``[N, G, d]`` in codebook ``[G, K, d]``, any float type, by exhaustive.cpp: ``[N, G]``.

    Raises:
        NoCompilerError: without a C++ compiler.
    """
    (groups, codes, dim), queries = codebook.shape, x.shape[0]
    tile = _compiled().tile_codes()
    padded = torch.nn.functional.pad(codebook.float(), (0, 0, 0, -codes % tile))
    columns = padded.view(groups, -1, tile, dim).transpose(2, 3).contiguous()
    x, indices = x.float().contiguous(), torch.empty(queries, groups, dtype=torch.int64)
    _compiled().exhaustive(x.data_ptr(), columns.data_ptr(), queries, groups, codes, dim, threads, indices.data_ptr())
    return indices


class Soak:
    """The comparisons so far, as pairs per search."""

    def __init__(self, threads: int) -> None:
        self.threads, self.pairs, self.problems = threads, 0, 0
        self.compared: collections.Counter[str] = collections.Counter()

    def check(self, problem: Problem) -> None:
        """All searches on one problem.

        Raises:
            WrongIndexError: at the first wrong index.
        """
        x, codebook = problem.x, problem.codebook
        truth = compiled_search(x, codebook, self.threads)
        rows = torch.randperm(len(x))[: max(1, SAMPLE_PAIRS // (codebook.shape[0] * codebook.shape[1]))]
        self._compare(problem, "plain torch, sampled", exhaustive_search(x[rows], codebook).index, truth[rows], rows)
        self._compare(problem, "native", nearest_code(x, codebook, impl="native"), truth)
        self._one_thread(problem, truth)
        index = CodebookIndex(codebook)
        self._compare(problem, "index", index.nearest_code(x), truth)
        index.refit((codebook.roll(7, 1).float() * -1.01).to(codebook.dtype))
        index.nearest_code(x[:32])
        index.refit(codebook)
        self._compare(problem, "index, refit", index.nearest_code(x), truth)
        if self.problems % CLONES_EVERY == 0 and problem.finite:
            self._clones(problem, truth)
        self.pairs += problem.pairs
        self.problems += 1

    def _one_thread(self, problem: Problem, truth: Tensor) -> None:
        order = torch.randperm(len(problem.x))
        torch.set_num_threads(1)
        try:
            found = nearest_code(problem.x[order], problem.codebook, impl="native")
        finally:
            torch.set_num_threads(self.threads)
        self._compare(problem, "native, 1 thread, permuted", found, truth[order], order)

    def _clones(self, problem: Problem, truth: Tensor) -> None:
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
            self._compare(problem, f"clone {name}", torch.from_numpy(found)[:, None], expected)
            walked, scanned = _dev.run_index(isa, queries.numpy(), panels, ids, boxes, len(codes))
            self._compare(problem, f"index scan {name}", torch.from_numpy(scanned).long()[:, None], expected)
            if bool(walkable):
                self._compare(problem, f"index walk {name}", torch.from_numpy(walked).long()[:, None], expected)

    def _compare(self, problem: Problem, what: str, got: Tensor, truth: Tensor, rows: Tensor | None = None) -> None:
        self.compared[what] += truth.numel() * problem.codebook.shape[1]
        wrong = (got != truth).nonzero()
        if len(wrong):
            n, g = wrong[0].tolist()
            query = n if rows is None else int(rows[n])
            raise WrongIndexError(
                f"WRONG: {what}: {len(wrong)} of {truth.numel()} indices, the first at query {query}, group {g}: got "
                f"{got[n, g].item()}, expected {truth[n, g].item()}.  {problem}"
            )


def write_latest(row: Row, folder: Path = RESULTS) -> None:
    """Put a row into the soak's file, in the place of an older one of the same instruction set."""
    old = read("soak-cpu", folder) if (folder / "soak-cpu.csv").exists() else []
    write("soak-cpu", [*(r for r in old if list(r) == list(row) and r["isa"] != row["isa"]), row], folder)


def main(arguments: list[str] | None = None) -> None:
    """Compare until enough pairs or problems are done, and write a row."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak")
    parser.add_argument("--pairs", type=float, default=1e10)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first problem; the next problems have the next seeds"
    )
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
            soak.check(problem(seed, int(options.most_pairs), MOST_WORK))
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
    write_latest(row | provenance("python -m tests.fuzz.soak"), options.out)
    print(f"{soak.pairs:.4g} pairs, {soak.problems} problems, {seconds:.0f} s; pairs compared: {compared}", flush=True)
    if wrong is not None:
        raise wrong


if __name__ == "__main__":
    main()
