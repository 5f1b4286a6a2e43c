"""Tables of the CPU search for docs/benchmarks.md; a sentence where there are no rows yet."""

import statistics
from pathlib import Path

from benchmarks.harness.rows import RESULTS
from benchmarks.tables import markdown, read, source

Row = dict[str, str]
NONE = "Not measured on this page's machine yet: `{command}` writes the rows."
PEERS = ("faiss", "nanoflann", "scipy cKDTree", "torch.cdist")

# The goals: brute force over torch.cdist, over faiss, frozen index over the best peer, refit and query over faiss,
# automatic over brute force.  None: reported, no goal.
TARGETS: dict[str, tuple[float | None, ...]] = {
    "512T": (50, 1.4, 5, 4, None),
    "256T": (40, 1.6, 5, 3.5, None),
    "256T-L": (30, 1.8, 8, 4, None),
    "d16": (18, 1.8, None, None, 0.95),
    "d32": (9, 1.7, None, None, 0.95),
    "d64": (5.5, 1.4, None, None, 0.95),
    "d256": (2, 1.1, None, None, 0.95),
    "d256, few codes": (1.3, 1.1, None, None, 0.95),
    "512T, real": (None, None, 8, None, None),
    "256T, real": (None, None, 8, None, None),
}


def ratios(slower: Row | None, faster: Row | None) -> list[float]:
    """How many times slower a row is than another, round by round; empty where one was not measured."""
    if slower is None or faster is None or not slower["rounds_ms"] or not faster["rounds_ms"]:
        return []
    pairs = zip(slower["rounds_ms"].split(), faster["rounds_ms"].split(), strict=False)
    return [float(a) / float(b) for a, b in pairs]


def shown(values: list[float], target: float | None, name: str = "") -> str:
    """A ratio with its spread, and beside it the goal; a miss in bold."""
    if not values:
        return "" if target is None else "not measured"
    median = statistics.median(values)
    text = f"{median:.3g}x ({min(values):.3g}-{max(values):.3g})" + (f" {name}" if name else "")
    if target is None:
        return text
    return f"{text}, goal {target:g}x" if median >= target else f"**{text}, MISSES {target:g}x**"


def acceptance_line(case: str, rows: dict[str, Row], peak: float) -> list[str]:
    """One case with one number of threads; ``peak`` in 10^9 operations per second."""
    brute, tree, refit, automatic = (
        rows.get(name) for name in ("revq", "revq, index", "revq, refit", "revq, automatic")
    )
    if brute is None or not brute["median_ms"]:
        return [case, *[""] * 4, "not reached", *[""] * 4]
    peers = [rows[name] for name in PEERS if name in rows and rows[name]["median_ms"]]
    best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
    goals = TARGETS.get(case, (None,) * 5)
    limit = peak / 2 / int(brute["d"])
    return [
        case,
        ", ".join(f"{key}={brute[key]}" for key in ("N", "G", "K", "d")),
        brute["threads"],
        brute["median_ms"],
        f"{100 * float(brute['gpairs_per_s']) / limit:.0f} %",
        shown(ratios(rows.get("torch.cdist"), brute), goals[0]),
        shown(ratios(rows.get("faiss"), brute), goals[1]),
        shown(ratios(best, tree), goals[2], best["provider"] if best and tree else ""),
        shown(ratios(rows.get("faiss"), refit), goals[3]),
        shown(ratios(brute, automatic), goals[4], (automatic or {"kernel": ""})["kernel"].partition(":")[0]),
    ]


def acceptance_table(folder: Path = RESULTS) -> str:
    """Goals beside what was measured, for each number of threads."""
    parts = []
    header = [
        "case",
        "shape",
        "threads",
        "brute force, ms",
        "of the FMA limit",
        "brute force vs torch.cdist",
        "vs faiss",
    ]
    header += ["frozen index vs the best peer's query", "refit + query vs faiss", "automatic vs brute force"]
    for path in sorted(folder.glob("acceptance-cpu-*t.csv"), reverse=True):
        rows = read(path.stem, folder)
        cases = list(dict.fromkeys(row["name"] for row in rows))
        peak = max(float(row["gflops_peak"]) for row in rows)  # something else running only makes it less
        lines = [acceptance_line(case, {r["provider"]: r for r in rows if r["name"] == case}, peak) for case in cases]
        first = rows[0]
        note = f" Peak, the highest of one measurement per case: {peak} GFLOP/s. Peers: {first['peers']}."
        parts.append(markdown(header, lines) + source(first) + note)
    return "\n\n".join(parts) or NONE.format(command="python -m benchmarks.acceptance")


def search_table(folder: Path = RESULTS) -> str:
    """The wide suite, one line per case."""
    rows = read("search-cpu", folder)
    header = [
        "case",
        "N",
        "G",
        "K",
        "d",
        "revq, ms",
        "Gpairs/s",
        "automatic, ms",
        "codes a tree visits",
        "fastest peer",
    ]
    header += ["faiss", "torch.cdist", "addmm, chunked"]
    lines = []
    for case in dict.fromkeys(row["name"] for row in rows):
        of = {row["provider"]: row for row in rows if row["name"] == case and row["provider"] != "revq, refit"}
        ours = of["revq"]
        peers = [row for name, row in of.items() if not name.startswith("revq") and row["median_ms"]]
        best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
        tree = of.get("revq, index", {}).get("kernel", "")
        line = [case, *(ours[key] for key in ("N", "G", "K", "d", "median_ms", "gpairs_per_s"))]
        line += [of.get("revq, automatic", {}).get("median_ms", ""), tree.partition("visits ")[2].partition(",")[0]]
        line.append(f"{best['provider']} {_times(best)}" if best else "")
        lines.append(line + [_times(of.get(name)) for name in ("faiss", "torch.cdist", "addmm, chunked")])
    return markdown(header, lines) + source(rows[0])


def _times(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['times_revq']}x" if row["times_revq"] else row["note"].partition(":")[0]


def wrong_table(folder: Path = RESULTS) -> str:
    """Every provider's shares of wrong codes, on the cases where any has some."""
    rows = [row for row in read("search-cpu", folder) if row["farther_share"]]
    wrong = [row for row in rows if _share(row, "farther_share") or _share(row, "other_twin_share")]
    if not wrong:
        return "No provider chose a wrong code."
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["name"] for row in wrong):
        of = {row["provider"]: row for row in rows if row["name"] == case}
        lines.append([case, *(_shares(of.get(name)) for name in names)])
    return markdown(["farther codes / another of equal codes", *names], lines) + source(rows[0])


def _share(row: Row, key: str) -> float:
    return float(row.get(key) or 0)


def _shares(row: Row | None) -> str:
    if row is None:
        return ""
    farther, twin = (100 * _share(row, key) for key in ("farther_share", "other_twin_share"))
    return f"{farther:.2g} % / {twin:.2g} %" if farther or twin else "0"


def memory_table(folder: Path = RESULTS) -> str:
    """Peak memory against K; beside it what the search may take."""
    rows = read("memory-cpu", folder)
    codes = list(dict.fromkeys(row["K"] for row in rows))
    of = {(row["provider"], row["K"]): row for row in rows}
    allowed = [f"{4 * int(k) * (int(rows[0]['d']) + 1) / 1e6 + 8:.1f}" for k in codes]
    lines = [["packed codebook + 8 MB", *allowed]]
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = [of.get((name, k), {}) for k in codes]
        lines.append([name, *(c.get("peak_above_inputs_mb") or c.get("note", "") for c in cells)])
    first = rows[0]
    header = [f"MB above the inputs, N={first['N']}, d={first['d']}", *(f"K={k}" for k in codes)]
    return markdown(header, lines) + source(first)


def soak_table(folder: Path = RESULTS) -> str:
    """The long tests so far."""
    if not (folder / "soak-cpu.csv").exists():
        return NONE.format(command="make soak")
    rows = read("soak-cpu", folder)
    keys = ("pairs", "problems", "wrong", "seed", "seconds", "isa")
    table = markdown([*keys, "commit"], [[row[key] for key in (*keys, "commit")] for row in rows])
    return table + source(rows[-1]) + f" Pairs compared by the last run: {rows[-1]['compared']}."
