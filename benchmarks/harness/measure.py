"""One case, every provider: indices checked, then calls timed in interleaved rounds; one row per provider and mode."""

import statistics
import time

import torch

from benchmarks.harness.cases import Case
from benchmarks.harness.correctness import Float64Truth, check_case
from benchmarks.harness.machine import roofline
from benchmarks.harness.memory import gpu_peak_mb
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Call, Clock, captured, interleaved
from benchmarks.providers import BRUTE_FORCE, Provider

MEASURED = (
    *("mode", "rounds", "median_ms", "min_ms", "max_ms", "prepare_ms", "gpairs_per_s", "gbytes_per_s", "roofline_ms"),
    *("times_revq", "rounds_ms", "peak_mb", "farther_share", "other_duplicate_share", "queries_checked"),
    *("pairs_checked", "kernel", "tuning", "note"),
)


def measure(
    case: Case, providers: list[Provider], clock: Clock, rounds: int, card_name: str = "", seconds_each: float = 4.0
) -> list[Row]:
    """One row per provider and mode ("eager", and "graph" on a GPU); the note of a row says why it has no times.

    Raises:
        WrongResultError: if an index of this library is wrong; then nothing is timed.
    """
    if clock.cuda:
        torch.cuda.empty_cache()  # memory of the previous case
    x, codebook = case.tensors(device=clock.device)
    truth = Float64Truth(x, codebook)
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for provider in providers:
        rows[provider.name] = blank(case, provider)
        calls |= _checked(case, provider, x, codebook, truth, rows[provider.name], clock)
    for name in list(calls):
        if clock.cuda and next(p for p in providers if p.name == name).capturable:
            calls |= _captured(name, calls[name], rows)
    times = interleaved(calls, clock, rounds, seconds_each)
    brute_graph = _graph(BRUTE_FORCE.name)
    for name, spent in times.items():
        as_graph = rows[name]["mode"] == "graph" and brute_graph in times
        brute_force = times[brute_graph if as_graph else BRUTE_FORCE.name]
        rows[name] |= _statistics(case, spent, brute_force, card_name)
    return list(rows.values())


def blank(case: Case, provider: Provider, note: str = "") -> Row:
    """A row with no measurement yet."""
    empty = dict.fromkeys(MEASURED, "") | {"mode": "eager", "tuning": provider.tuning, "note": note}
    return {**case._asdict(), "provider": provider.name, **empty}


def _checked(
    case: Case, provider: Provider, x: torch.Tensor, codebook: torch.Tensor, truth: Float64Truth, row: Row, clock: Clock
) -> dict[str, Call]:
    """Call a provider once, check its indices and fill ``row``; return its call, or an empty dict if it failed."""
    row["note"] = provider.missing
    if provider.max_code_dim is not None and case.d > provider.max_code_dim:
        row["note"] = f"not tried: d > {provider.max_code_dim}"
    if row["note"]:
        return {}
    try:
        start = time.perf_counter()
        prepared = provider.prepared(codebook)
        indices = provider.call(x, prepared)
        if clock.cuda:
            torch.cuda.synchronize(clock.device)
        row["note"] = f"first call {time.perf_counter() - start:.1f} s"
        shares = truth.wrong_shares(indices)
        if provider.ours:
            row["pairs_checked"] = check_case(case, x, codebook, indices)
        row["kernel"] = "" if provider.describe is None else provider.describe(x, prepared)
        row["farther_share"], row["other_duplicate_share"] = (round(share, 7) for share in shares)
        row["queries_checked"] = len(truth.rows) * case.G
        if provider.prepare is not None:
            row["prepare_ms"] = round(clock.once(lambda: provider.prepared(codebook)), 3)
        peak = gpu_peak_mb(lambda: provider.call(x, prepared), clock.device)
        row["peak_mb"] = "" if peak is None else round(peak, 1)
    except Exception as error:  # another library may fail in any way; this library must not
        if provider.ours:
            raise
        row["note"] = _short(error)
        if clock.cuda:
            torch.cuda.empty_cache()
        return {}
    return {provider.name: lambda: provider.call(x, prepared)}


def _graph(name: str) -> str:
    return f"{name}, graph"


def _captured(name: str, call: Call, rows: dict[str, Row]) -> dict[str, Call]:
    """The same call as the replay of a CUDA graph, with a row of its own."""
    eager = rows[name]
    rows[_graph(name)] = {**eager, "mode": "graph", "peak_mb": "", "prepare_ms": ""}
    try:
        eager_indices, replay = call(), captured(call)
        if not torch.equal(eager_indices, replay()):
            raise RuntimeError("the graph's indices differ from the eager call's")
    except Exception as error:
        rows[_graph(name)]["note"] = f"not captured: {_short(error)}"
        return {}
    return {_graph(name): replay}


def _statistics(case: Case, spent: list[float], brute_force: list[float], card_name: str) -> Row:
    median, limits = statistics.median(spent), roofline(case, card_name)
    return {
        "rounds": len(spent),
        "rounds_ms": " ".join(f"{time:.4f}" for time in spent),
        "median_ms": round(median, 4),
        "min_ms": round(min(spent), 4),
        "max_ms": round(max(spent), 4),
        "gpairs_per_s": round(case.pairs / median / 1e6, 3),
        "gbytes_per_s": round(case.bytes / median / 1e6, 3),
        "roofline_ms": "" if limits is None else round(limits.tensor_core_search, 4),
        "times_revq": round(statistics.median(a / b for a, b in zip(spent, brute_force, strict=False)), 2),
    }


def _short(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"
