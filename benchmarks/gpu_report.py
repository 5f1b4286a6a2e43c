"""Tables and plots of the cards that were measured, for docs/benchmarks.md; a sentence where there is none yet."""

from pathlib import Path

from benchmarks.harness.rows import RESULTS
from benchmarks.tables import PAGE, markdown, read, source

NONE = (
    "No GPU was at hand when this page was made, so it holds no time of one. `python -m benchmarks.gpu` checks, measures and "
    "writes the rows on a machine that has one."
)


def cards(folder: Path = RESULTS) -> list[str]:
    """Cards with rows of a search, by the name in their files."""
    return sorted(path.stem.removeprefix("search-gpu-") for path in folder.glob("search-gpu-*.csv"))


def gpu_section(folder: Path = RESULTS, page: Path = PAGE) -> str:
    """Everything known about every measured card."""
    parts = []
    for slug in cards(folder):
        rows = read(f"search-gpu-{slug}", folder)
        first = rows[0]
        parts.append(f"### {first['card']}, driver {first['driver']}, CUDA {first['cuda']}, Triton {first['triton']}")
        picture = plot(rows, page.parent / f"search-gpu-{slug}.svg")
        if picture:
            parts.append(f"![Milliseconds per search]({picture.name})")
        parts += [search_table(rows), wrong_table(rows)]
        for name, table in (("gate", gate_table), ("train", train_table), ("rates", rates_table)):
            if (folder / f"{name}-gpu-{slug}.csv").exists():
                parts.append(table(read(f"{name}-gpu-{slug}", folder)))
    return "\n\n".join(parts) if parts else NONE


def search_table(rows: list[dict[str, str]]) -> str:
    """One line per case: our times, the floor, and how many times slower each peer's eager call is."""
    of = {(row["name"], row["provider"], row["mode"]): row for row in rows}
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "revq"))
    header = ["case", "N", "G", "K", "d", "revq, ms", "as a graph", "floor", "Gpairs/s", "GB/s", "peak MB"]
    lines = []
    for case in dict.fromkeys(row["name"] for row in rows):
        ours, graph = of[case, "revq", "eager"], of.get((case, "revq", "graph"), {})
        line = [case, *(ours[key] for key in ("N", "G", "K", "d", "median_ms")), graph.get("median_ms", "")]
        line += [ours[key] for key in ("floor_ms", "gpairs_per_s", "gbytes_per_s", "peak_mb")]
        for peer in peers:
            line.append(_against(of.get((case, peer, "eager"))))
        lines.append(line)
    return markdown(header + [f"{peer}, times slower" for peer in peers], lines) + source(rows[0])


def wrong_table(rows: list[dict[str, str]]) -> str:
    """Shares of wrong codes, for the providers and cases that have any."""
    lines = []
    for row in rows:
        if row["mode"] == "eager" and row["farther_share"]:
            farther, twin = (float(row[key]) for key in ("farther_share", "other_twin_share"))
            if farther or twin:
                shares = [f"{100 * share:.3g} %" for share in (farther, twin)]
                lines.append([row["name"], row["provider"], *shares, row["queries_checked"]])
    if not lines:
        return "No provider chose a wrong code."
    return markdown(["case", "provider", "farther codes", "another of equal codes", "queries checked"], lines)


def gate_table(rows: list[dict[str, str]]) -> str:
    lines = [[row[key] for key in ("name", "checked", "wrong", "seconds", "kernel")] for row in rows]
    return markdown(["what was checked before anything was timed", "how much", "wrong", "seconds", "kernel"], lines)


def train_table(rows: list[dict[str, str]]) -> str:
    keys = ("name", "way", "median_ms", "peak_mb", "equal", "note")
    header = ["training step (forward, backward, AdamW)", "way", "ms", "peak MB", "equal to eager", "note"]
    return markdown(header, [[row[key] for key in keys] for row in rows]) + source(rows[0])


def rates_table(rows: list[dict[str, str]]) -> str:
    keys = ("quantity", "value", "unit", "note")
    return markdown(["rate", "value", "unit", "note"], [[row[key] for key in keys] for row in rows]) + source(rows[0])


def plot(rows: list[dict[str, str]], path: Path) -> Path | None:
    """Times of every provider on a logarithmic axis, the floor as a line; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same file for the same rows
    from matplotlib import pyplot

    timed = [row for row in rows if row["median_ms"]]
    names = list(dict.fromkeys(row["name"] for row in timed))
    series = list(dict.fromkeys((row["provider"], row["mode"]) for row in timed))
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(names) + 2))
    for place, (provider, mode) in enumerate(series):
        points = [
            (float(row["median_ms"]), names.index(row["name"]) + 0.06 * (place - len(series) / 2))
            for row in timed
            if (row["provider"], row["mode"]) == (provider, mode)
        ]
        label = provider + (", graph" if mode == "graph" else "")
        axes.scatter(*zip(*points, strict=True), label=label, s=24, marker="s" if mode == "graph" else "o")
    floors = {row["name"]: float(row["floor_ms"]) for row in timed if row["floor_ms"]}
    if floors:
        heights = [names.index(name) for name in floors]
        axes.scatter(list(floors.values()), heights, marker="|", s=300, color="black", label="floor")
    axes.set(xscale="log", xlabel="milliseconds per search (median)", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _against(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return f"{row['times_revq']}x" if row["times_revq"] else row["note"].partition(":")[0]
