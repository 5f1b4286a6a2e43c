"""One case, every provider: checked, then timed in turn; a row each, whatever became of it."""

import statistics
import time
from typing import Any

import torch

from benchmarks.gate import check_case
from benchmarks.harness.cases import Case
from benchmarks.harness.correctness import Judge, Shares
from benchmarks.harness.machine import floors
from benchmarks.harness.timing import Call, Clock, captured, interleaved, peak_mb
from benchmarks.providers import OURS, Provider

Row = dict[str, Any]

MEASURED = (
    *("mode", "rounds", "median_ms", "min_ms", "max_ms", "prepare_ms", "gpairs_per_s", "gbytes_per_s", "floor_ms"),
    *("times_revq", "rounds_ms", "peak_mb", "farther_share", "other_twin_share", "queries_checked", "pairs_gated"),
    *("kernel", "tuning", "note"),
)


def measure(
    case: Case, providers: list[Provider], clock: Clock, rounds: int, card_name: str = "", seconds_each: float = 4.0
) -> list[Row]:
    """One row per provider and mode ("eager", and "graph" on a card); a provider that fails says so in its note.

    Raises:
        WrongAnswerError: if an index of ours is wrong; nothing is timed then.
    """
    if clock.cuda:
        torch.cuda.empty_cache()  # what the last case left
    x, codebook = case.tensors(device=clock.device)
    judge, rows, calls = Judge(x, codebook), {}, {}
    for provider in providers:
        rows[provider.name] = blank(case, provider)
        calls |= _checked(case, provider, x, codebook, judge, rows[provider.name], clock)
    for name in list(calls):
        if clock.cuda and next(p for p in providers if p.name == name).capturable:
            calls |= _captured(name, calls[name], rows)
    times = interleaved(calls, clock, rounds, seconds_each)
    for name, spent in times.items():
        ours = times[OURS.name + (", graph" if rows[name]["mode"] == "graph" and _graph(OURS.name) in times else "")]
        rows[name] |= _timed(case, spent, ours, card_name)
    return list(rows.values())


def blank(case: Case, provider: Provider, note: str = "") -> Row:
    """A row with nothing measured yet."""
    empty = dict.fromkeys(MEASURED, "")
    return {
        **case._asdict(),
        "provider": provider.name,
        **empty,
        "mode": "eager",
        "tuning": provider.tuning,
        "note": note,
    }


def _checked(
    case: Case, provider: Provider, x: torch.Tensor, codebook: torch.Tensor, judge: Judge, row: Row, clock: Clock
) -> dict[str, Call]:
    """Warm a provider up and judge its answer into ``row``; its call if it works."""
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
        shares: Shares = judge.shares(indices)
        if provider.ours:
            row["pairs_gated"] = check_case(case, x, codebook, indices)
        warm(provider, x, prepared)
        row["kernel"] = "" if provider.describe is None else provider.describe(x, prepared)
        row["farther_share"], row["other_twin_share"] = (round(share, 7) for share in shares)
        row["queries_checked"] = len(judge.rows) * case.G
        if provider.prepare is not None:
            row["prepare_ms"] = round(clock.once(lambda: provider.prepared(codebook)), 3)
        peak = peak_mb(lambda: provider.call(x, prepared), clock.device)
        row["peak_mb"] = "" if peak is None else round(peak, 1)
    except Exception as error:  # a peer may fail in any way; ours must not
        if provider.ours:
            raise
        row["note"] = _short(error)
        if clock.cuda:
            torch.cuda.empty_cache()
        return {}
    return {provider.name: lambda: provider.call(x, prepared)}


def warm(provider: Provider, x: torch.Tensor, prepared: Any, seconds: float = 4.0) -> None:
    """The calls that a provider wants before it is timed, besides the first."""
    end = time.perf_counter() + seconds
    for _ in range(provider.warm_calls - 1):
        provider.call(x, prepared)
        if time.perf_counter() > end:
            break


def _graph(name: str) -> str:
    return f"{name}, graph"


def _captured(name: str, call: Call, rows: dict[str, Row]) -> dict[str, Call]:
    """The same call as a graph, with a row of its own."""
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


def _timed(case: Case, spent: list[float], ours: list[float], card_name: str) -> Row:
    median, floor = statistics.median(spent), floors(case, card_name)
    return {
        "rounds": len(spent),
        "rounds_ms": " ".join(f"{time:.4f}" for time in spent),
        "median_ms": round(median, 4),
        "min_ms": round(min(spent), 4),
        "max_ms": round(max(spent), 4),
        "gpairs_per_s": round(case.pairs / median / 1e6, 3),
        "gbytes_per_s": round(case.bytes / median / 1e6, 3),
        "floor_ms": "" if floor is None else round(floor.tensor_core_form, 4),
        "times_revq": round(statistics.median(a / b for a, b in zip(spent, ours, strict=False)), 2),
    }


def _short(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"
