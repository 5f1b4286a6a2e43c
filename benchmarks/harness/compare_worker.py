"""Times one case of `compare` in another environment: separate because it runs by its text, without this repository.

It needs torch and the public names of `revq_kernels` alone.  A line of standard input names a case, a line of standard
output answers with seconds per call; between the two lines the process waits.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import revq_kernels

SECONDS, MOST_CALLS = 0.3, 400
"""A measurement repeats the call until either is reached, and is the shortest: longer ones were interrupted."""


def training_step(x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], object]:
    """Forward, backward and AdamW of `FastChannelVQ` with one codebook per group."""
    groups, codes, dim = codebook.shape
    quantizer = revq_kernels.FastChannelVQ(codes, dim, num_groups=groups)
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        quantizer(x).loss.backward()
        optimizer.step()

    return step


def prepared(what: str, x: torch.Tensor, codebook: torch.Tensor) -> Callable[[], object]:
    """The call that a case times."""
    if what == "search":
        return lambda: revq_kernels.nearest_code(x, codebook)
    if what == "quantize":
        count = torch.zeros(codebook.shape[:2], dtype=torch.int64)
        return lambda: revq_kernels.quantize(x, codebook, count=count)
    if what == "index":
        index = revq_kernels.CodebookIndex(codebook)
        return lambda: index.nearest_code(x)
    if what == "index build":
        return lambda: revq_kernels.CodebookIndex(codebook)
    return training_step(x, codebook)


def main() -> None:
    """Answer until standard input ends; the first line of output says which package answers."""
    answers = os.fdopen(os.dup(1), "w")  # what a library prints goes to standard error
    os.dup2(2, 1)
    print(json.dumps(str(Path(revq_kernels.__file__).parent)), file=answers, flush=True)
    key: dict | None = None
    for line in sys.stdin:
        case = json.loads(line)
        torch.set_num_threads(case["threads"])
        if case != key:
            key, call = case, prepared(case["what"], *torch.load(case["tensors"]))
        call()  # the other process has used the caches meanwhile
        seconds: list[float] = []
        while sum(seconds) < SECONDS and len(seconds) < MOST_CALLS:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(min(seconds)), file=answers, flush=True)


if __name__ == "__main__":
    main()
