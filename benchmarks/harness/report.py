"""Writes the tables of docs/benchmarks.md and docs/drop-in.md, each between its markers.

The tables come from the rows, the measurements that the benchmarks wrote to benchmarks/results (rows.py).
"""

import re
import statistics
from pathlib import Path

from benchmarks.harness.plots import cpu_plots, gpu_plot
from benchmarks.harness.rows import RESULTS, Row, markdown, read, source

DOCS = Path(__file__).parents[2] / "docs"
PAGE, DROP_IN_PAGE = DOCS / "benchmarks.md", DOCS / "drop-in.md"
NOT_MEASURED = "Not measured on this page's machine yet: `{command}` writes the rows."
NO_GPU = (
    "No GPU was at hand when this page was made, so it holds no time of one. `python -m benchmarks.gpu` checks, measures and "
    "writes the rows on a machine that has one."
)
PEERS = ("faiss", "nanoflann", "scipy cKDTree", "torch.cdist")
IMAGES = ("vae", "quantized", "rectified")
GOALS: dict[str, tuple[float | None, ...]] = {
    "512T": (50, 1.4, 5, 4),
    "256T": (40, 1.6, 5, 3.5),
    "256T-L": (30, 1.8, 8, 4),
    "d16": (18, 1.8, None, None),
    "d32": (9, 1.7, None, None),
    "d64": (5.5, 1.4, None, None),
    "d256": (2, 1.1, None, None),
    "d256, few codes": (1.3, 1.1, None, None),
    "512T, real": (None, None, 8, None),
    "256T, real": (None, None, 8, None),
}
"""Per case, how many times faster this library should be, in four comparisons; None if a comparison has no goal.

1. Brute force, compared with torch.cdist.  2. Brute force, compared with faiss.  3. A query of the index, compared with
the query of the best peer.  4. A refit of the index and a query together, compared with faiss.
"""


def rewrite_pages() -> None:
    """Put the tables of the rows into the pages."""
    rewrite(
        PAGE,
        {
            "acceptance": acceptance_table(),
            "soak": soak_table(),
            "search": search_table(),
            "wrong": wrong_table(),
            "plots": cpu_plots(RESULTS, PAGE),
            "search-gpu": gpu_section(),
            "memory": memory_table(),
            "reset": reset_table(),
            "rectifier": rectifier_table(),
            "demo": demo_table(),
        },
    )
    rewrite(DROP_IN_PAGE, {"drop-in": drop_in_table()})


def rewrite(page: Path, tables: dict[str, str]) -> None:
    """Replace the text between each table's markers."""
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.S)
    page.write_text(text)


# The searches on a CPU


def ratios(slower: Row | None, faster: Row | None) -> list[float]:
    """How many times slower a row is than another, round by round; empty if one was not measured."""
    if slower is None or faster is None or not slower["rounds_ms"] or not faster["rounds_ms"]:
        return []
    pairs = zip(slower["rounds_ms"].split(), faster["rounds_ms"].split(), strict=False)
    return [float(a) / float(b) for a, b in pairs]


def ratio_cell(values: list[float], goal: float | None, name: str = "") -> str:
    """A ratio with its spread and its goal; bold if it misses the goal."""
    if not values:
        return "" if goal is None else "not measured"
    median = statistics.median(values)
    text = f"{median:.3g}x ({min(values):.3g}-{max(values):.3g})" + (f" {name}" if name else "")
    if goal is None:
        return text
    return f"{text}, goal {goal:g}x" if median >= goal else f"**{text}, MISSES {goal:g}x**"


def acceptance_table(folder: Path = RESULTS) -> str:
    """Goals and measured ratios, for each number of threads."""
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
    header += ["index vs the best peer's query", "refit + query vs faiss", "index vs brute force", "index build, ms"]
    for path in sorted(folder.glob("acceptance-cpu-*t.csv"), reverse=True):
        rows = read(path.stem, folder)
        cases = list(dict.fromkeys(row["name"] for row in rows))
        peak = max(float(row["gflops_peak"]) for row in rows)  # other programs can only lower a measured peak
        lines = [_acceptance_line(case, {r["provider"]: r for r in rows if r["name"] == case}, peak) for case in cases]
        first = rows[0]
        note = f" Peak, the highest of one measurement per case: {peak} GFLOP/s. Peers: {first['peers']}."
        parts.append(markdown(header, lines) + source(first) + note)
    return "\n\n".join(parts) or NOT_MEASURED.format(command="python -m benchmarks.cpu acceptance")


def _acceptance_line(case: str, rows: dict[str, Row], peak: float) -> list[str]:
    """One case with one number of threads; ``peak`` in 10^9 operations per second."""
    brute, index, refit = (rows.get(name) for name in ("revq", "revq, index", "revq, refit"))
    if brute is None or not brute["median_ms"]:
        return [case, *[""] * 4, "not reached", *[""] * 5]
    peers = [rows[name] for name in PEERS if name in rows and rows[name]["median_ms"]]
    best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
    goals = GOALS.get(case, (None,) * 4)
    limit = peak / 2 / int(brute["d"])
    return [
        case,
        ", ".join(f"{key}={brute[key]}" for key in ("N", "G", "K", "d")),
        brute["threads"],
        brute["median_ms"],
        f"{100 * float(brute['gpairs_per_s']) / limit:.0f} %",
        ratio_cell(ratios(rows.get("torch.cdist"), brute), goals[0]),
        ratio_cell(ratios(rows.get("faiss"), brute), goals[1]),
        ratio_cell(ratios(best, index), goals[2], best["provider"] if best and index else ""),
        ratio_cell(ratios(rows.get("faiss"), refit), goals[3]),
        ratio_cell(ratios(brute, index), None),
        index["prepare_ms"] if index else "",
    ]


def search_table(folder: Path = RESULTS) -> str:
    """The wide suite, one line per case."""
    rows = read("search-cpu", folder)
    header = ["case", "N", "G", "K", "d", "revq, ms", "Gpairs/s", "index, ms", "its build, ms", "codes it visits"]
    header += ["fastest peer", "faiss", "torch.cdist", "addmm, chunked"]
    lines = []
    for case in dict.fromkeys(row["name"] for row in rows):
        of = {row["provider"]: row for row in rows if row["name"] == case and row["provider"] != "revq, refit"}
        ours, index = of["revq"], of.get("revq, index", {})
        peers = [row for name, row in of.items() if not name.startswith("revq") and row["median_ms"]]
        best = min(peers, key=lambda row: float(row["median_ms"]), default=None)
        line = [case, *(ours[key] for key in ("N", "G", "K", "d", "median_ms", "gpairs_per_s"))]
        line += [index.get("median_ms", ""), index.get("prepare_ms", "")]
        line.append(index.get("kernel", "").partition("visits ")[2].partition(",")[0])
        line.append(f"{best['provider']} {_times_slower(best)}" if best else "")
        lines.append(line + [_times_slower(of.get(name)) for name in ("faiss", "torch.cdist", "addmm, chunked")])
    return markdown(header, lines) + source(rows[0])


def _times_slower(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['times_revq']}x" if row["times_revq"] else row["note"].partition(":")[0]


def wrong_table(folder: Path = RESULTS) -> str:
    """Shares of wrong codes: a line per case in which some provider is wrong, a column for every provider."""
    rows = [row for row in read("search-cpu", folder) if row["farther_share"]]
    wrong = [row for row in rows if any(_shares(row))]
    if not wrong:
        return "No provider returned a wrong code."
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["name"] for row in wrong):
        of = {row["provider"]: row for row in rows if row["name"] == case}
        lines.append([case, *(_shares_cell(of.get(name)) for name in names)])
    return markdown(["farther codes / another duplicate", *names], lines) + source(rows[0])


def _shares(row: Row) -> tuple[float, float]:
    """Two shares in percent: indices of a farther code; indices of a duplicate that is not the lowest."""
    return 100 * float(row["farther_share"] or 0), 100 * float(row["other_duplicate_share"] or 0)


def _shares_cell(row: Row | None) -> str:
    if row is None:
        return ""
    farther, duplicate = _shares(row)
    return f"{farther:.2g} % / {duplicate:.2g} %" if farther or duplicate else "0"


def memory_table(folder: Path = RESULTS) -> str:
    """Peak memory against K, and the limit that this library's search does not exceed."""
    rows = read("memory-cpu", folder)
    codes = list(dict.fromkeys(row["K"] for row in rows))
    of = {(row["provider"], row["K"]): row for row in rows}
    limits = [f"{4 * int(k) * (int(rows[0]['d']) + 1) / 1e6 + 8:.1f}" for k in codes]
    lines = [["packed codebook + 8 MB", *limits]]
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = [of.get((name, k), {}) for k in codes]
        lines.append([name, *(c.get("peak_above_inputs_mb") or c.get("note", "") for c in cells)])
    first = rows[0]
    header = [f"MB above the inputs, N={first['N']}, d={first['d']}", *(f"K={k}" for k in codes)]
    return markdown(header, lines) + source(first)


def soak_table(folder: Path = RESULTS) -> str:
    """The latest long test of each instruction set."""
    if not (folder / "soak-cpu.csv").exists():
        return NOT_MEASURED.format(command="make soak")
    rows = read("soak-cpu", folder)
    keys = ("pairs", "problems", "wrong", "seed", "seconds", "isa", "commit", "date")
    table = markdown(list(keys), [[row[key] for key in keys] for row in rows])
    return table + source(rows[-1]) + f" Pairs compared by this run: {rows[-1]['compared']}."


# The GPU


def gpu_section(folder: Path = RESULTS, page: Path = PAGE) -> str:
    """All tables and the plot of every measured GPU."""
    parts = []
    for path in sorted(folder.glob("search-gpu-*.csv")):
        rows, slug = read(path.stem, folder), path.stem.removeprefix("search-gpu-")
        first = rows[0]
        parts.append(f"### {first['card']}, driver {first['driver']}, CUDA {first['cuda']}, Triton {first['triton']}")
        plot = gpu_plot(rows, page.parent / f"search-gpu-{slug}.svg")
        if plot:
            parts.append(f"![Milliseconds per search]({plot.name})")
        parts += [_gpu_search_table(rows), _gpu_wrong_table(rows)]
        for name, (header, keys) in GPU_TABLES.items():
            if (folder / f"{name}-gpu-{slug}.csv").exists():
                other = read(f"{name}-gpu-{slug}", folder)
                parts.append(markdown(header, [[row[key] for key in keys] for row in other]) + source(other[0]))
    return "\n\n".join(parts) if parts else NO_GPU


GPU_TABLES = {
    "correctness": (
        ["what was checked before anything was timed", "how much", "wrong", "seconds", "kernel"],
        ("name", "checked", "wrong", "seconds", "kernel"),
    ),
    "train": (
        ["training step (forward, backward, AdamW)", "mode", "ms", "peak MB", "equal to eager", "note"],
        ("name", "mode", "median_ms", "peak_mb", "equal", "note"),
    ),
    "rates": (["rate", "value", "unit", "note"], ("quantity", "value", "unit", "note")),
}
"""The further tables of a GPU: file of rows (``<key>-gpu-<card>.csv``) -> header of the table, columns of the file."""


def _gpu_search_table(rows: list[Row]) -> str:
    """One line per case: our times, the roofline, and how many times slower each peer's eager call is."""
    of = {(row["name"], row["provider"], row["mode"]): row for row in rows}
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "revq"))
    header = ["case", "N", "G", "K", "d", "revq, ms", "as a graph", "roofline", "Gpairs/s", "GB/s", "peak MB"]
    lines = []
    for case in dict.fromkeys(row["name"] for row in rows):
        ours, graph = of[case, "revq", "eager"], of.get((case, "revq", "graph"), {})
        line = [case, *(ours[key] for key in ("N", "G", "K", "d", "median_ms")), graph.get("median_ms", "")]
        line += [ours[key] for key in ("roofline_ms", "gpairs_per_s", "gbytes_per_s", "peak_mb")]
        lines.append(line + [_times_slower(of.get((case, peer, "eager"))) for peer in peers])
    return markdown(header + [f"{peer}, times slower" for peer in peers], lines) + source(rows[0])


def _gpu_wrong_table(rows: list[Row]) -> str:
    """Shares of wrong codes: a line per case and provider, only those with a wrong code."""
    lines = [
        [row["name"], row["provider"], *(f"{share:.3g} %" for share in _shares(row)), row["queries_checked"]]
        for row in rows
        if row["mode"] == "eager" and any(_shares(row))
    ]
    if not lines:
        return "No provider returned a wrong code."
    return markdown(["case", "provider", "farther codes", "another duplicate", "queries checked"], lines)


# The method


def reset_table(folder: Path = RESULTS) -> str:
    """The demo's quantizer with the reset of unused codes and without it."""
    rows = read("reset-effect", folder)
    lines = [
        [
            row["initialization"],
            row["K"],
            "with" if row["reset"] == "True" else "without",
            f"{100 * float(row['utilization']):.2f} %",
            row["perplexity"],
            row["training_mse"],
            row["held_out_mse"],
        ]
        for row in rows
    ]
    header = ["first codebook", "K", "reset", "utilization", "perplexity", "training MSE", "held-out MSE"]
    return markdown(header, lines) + source(rows[0])


def rectifier_table(folder: Path = RESULTS) -> str:
    """The rectifiers on the demo's latents."""
    rows = read("rectifier-effect", folder)
    keys = ["rectifier", "form", "parameters", "held_out_quantized_mse", "held_out_rectified_mse"]
    lines = [[*(row[key] for key in keys), f"{row['gain_percent']} %"] for row in rows]
    header = ["rectifier", "form", "parameters", "held-out MSE, quantized", "rectified", "gain"]
    return markdown(header, lines) + source(rows[0])


def demo_table(folder: Path = RESULTS) -> str:
    """The demo, one line per seed."""
    rows = read("demo-cpu", folder)
    lines = []
    for row in rows:
        images = [f"{float(row[f'{name}_psnr']):.2f} / {float(row[f'{name}_ssim']):.4f}" for name in IMAGES]
        errors = [f"{float(row[f'latent_mse_{name}']):.4f}" for name in IMAGES[1:]]
        gain, used = (f"{100 * float(row[key]):.1f} %" for key in ("rectifier_gain", "utilization"))
        seconds = sum(float(value) for key, value in row.items() if key.startswith("seconds_"))
        lines.append([row["seed"], *images, " -> ".join(errors), gain, used, f"{seconds:.0f}"])
    header = ["seed", *(f"{name}, PSNR / SSIM" for name in IMAGES), "latent MSE", "gain", "utilization", "seconds"]
    return markdown(header, lines) + source(rows[0])


# Other libraries' quantizers


def drop_in_table(folder: Path = RESULTS) -> str:
    """One line per quantizer: before -> after."""
    if not (folder / "drop-in.csv").exists():
        return NOT_MEASURED.format(command="python -m benchmarks.drop_in")
    header = ["quantizer", "d", "K", "N", "ms, evaluation", "ms, training step", "MB, evaluation", "MB, training"]
    header.append("% wrong codes: float32 / bfloat16 autocast / patched in autocast")
    rows, lines = read("drop-in", folder), []
    for row in (row for row in rows if row["mode"] == "evaluation"):
        step = next((r for r in rows if r["quantizer"] == row["quantizer"] and r["mode"] != "evaluation"), None)
        wrong = " / ".join(row[f"wrong_{which}"] or "-" for which in ("original", "original_bf16", "patched_bf16"))
        times, memory = ([cell(one) for one in (row, step)] for cell in (_before_after_ms, _before_after_mb))
        lines.append([*(row[key] for key in ("quantizer", "d", "K", "N")), *times, *memory, wrong])
    return markdown(header, lines) + source(rows[0]) + f" {rows[0]['packages']}; medians of {rows[0]['rounds']} rounds."


def _before_after_ms(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['original_ms']):.0f} -> {float(row['patched_ms']):.1f} (**{float(row['times']):.1f}x**)"


def _before_after_mb(row: Row | None) -> str:
    return "-" if row is None else f"{row['original_mb']} -> {row['patched_mb']}"
