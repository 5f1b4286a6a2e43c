"""Plots of the searches as SVG files beside docs/benchmarks.md; none without matplotlib or rows."""

import re
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import tokenizers
from benchmarks.harness.rows import Row, read

COLORS = {
    "revq": "#000000",
    "revq, index": "#d62728",
    "faiss": "#1f77b4",
    "torch.cdist": "#2ca02c",
    "addmm, chunked": "#98df8a",
    "scikit-learn": "#9467bd",
    "nanoflann": "#e377c2",
    "scipy cKDTree": "#8c564b",
    "KeOps": "#bcbd22",
    "torch.compile, direct": "#17becf",
    "torch.compile, expansion": "#9edae5",
    "vector-quantize-pytorch": "#7f7f7f",
}
LIMIT_PROVIDERS = ("revq", "faiss", "addmm, chunked", "torch.cdist", "scikit-learn")


def cpu_plots(folder: Path, page: Path) -> str:
    """Draw the plots of the CPU's rows beside the page; the Markdown that shows them."""
    if not _use_matplotlib():
        return ""
    names = {case.name for case in tokenizers() if " N" not in case.name}
    rows = [row for row in read("search-cpu", folder) if row["name"] in names and row["median_ms"]]
    memory = [row for row in read("memory-cpu", folder) if row["peak_above_inputs_mb"]]
    drawn = []
    if rows:
        drawn.append(("Throughput against K for every d", throughput(rows, page.parent / "search-cpu-throughput.svg")))
        drawn.append(("Share of the FMA limit", limit(rows, page.parent / "search-cpu-limit.svg")))
    if len({row["K"] for row in memory}) > 1:
        drawn.append(("Peak memory against K", memory_against_codes(memory, page.parent / "search-cpu-memory.svg")))
    return "\n\n".join(f"![{title}]({path.name})" for title, path in drawn)


def throughput(rows: list[Row], path: Path) -> Path:
    """One panel per d."""
    from matplotlib import pyplot

    dims = sorted({int(row["d"]) for row in rows})
    columns = min(3, len(dims))
    lines = -(-len(dims) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(3.8 * columns, 3.1 * lines), sharex=True, squeeze=False)
    for axes, dim in zip(panels.flat, dims, strict=False):
        here = [row for row in rows if int(row["d"]) == dim]
        for name in _names(here):
            points = sorted((int(row["K"]), float(row["gpairs_per_s"])) for row in here if row["provider"] == name)
            _line(axes, points, name)
        if here[0].get("gflops_peak"):
            axes.axhline(float(here[0]["gflops_peak"]) / 2 / dim, color="black", linestyle=":", label="FMA limit")
        axes.set(xscale="log", yscale="log", title=f"d = {dim}")
        axes.grid(axis="y", alpha=0.3)
        _code_ticks(axes, sorted({int(row["K"]) for row in rows}))
    for axes in panels[-1]:
        axes.set_xlabel("K")
    for axes in panels[:, 0]:
        axes.set_ylabel("Gpairs/s")
    return _save(figure, panels.flat, path)


def limit(rows: list[Row], path: Path) -> Path:
    """Share of the multiply-add peak against d, at K = 16,384 and, for this library, at K = 262,144."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.8))
    for codes, style in ((16384, "-"), (262144, "--")):
        for name in LIMIT_PROVIDERS if codes == 16384 else ("revq",):
            points = sorted(
                (int(row["d"]), 200 * float(row["gpairs_per_s"]) * int(row["d"]) / float(row["gflops_peak"]))
                for row in rows
                if row["provider"] == name and int(row["K"]) == codes and row.get("gflops_peak")
            )
            _line(axes, points, name, style, name if codes == 16384 else f"{name}, K = {codes:,}")
    dims = sorted({int(row["d"]) for row in rows})
    axes.set(xscale="log", xlabel="d", ylabel="% of the float32 FMA limit", ylim=(0, 205), title="K = 16,384")
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.minorticks_off()
    axes.axhline(100, color="black", linestyle=":")
    axes.grid(alpha=0.3)
    return _save(figure, [axes], path)


def memory_against_codes(rows: list[Row], path: Path) -> Path:
    """Megabytes above the inputs, and the limit that the search keeps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.8))
    for name in _names(rows):
        mine = [row for row in rows if row["provider"] == name]
        _line(axes, sorted((int(row["K"]), max(0.1, float(row["peak_above_inputs_mb"]))) for row in mine), name)
    codes, first = sorted({int(row["K"]) for row in rows}), rows[0]
    allowed = [4 * k * (int(first["d"]) + 1) / 1e6 + 8 for k in codes]
    axes.plot(codes, allowed, color="black", linestyle=":", label="packed codebook + 8 MB")
    title = f"N = {first['N']}, d = {first['d']}"
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="MB above the inputs (0.1: none seen)", title=title)
    _code_ticks(axes, codes)
    axes.grid(alpha=0.3, which="major")
    return _save(figure, [axes], path)


def gpu_plot(rows: list[Row], path: Path) -> Path | None:
    """Times of every provider on a logarithmic axis, with the roofline; None without matplotlib."""
    if not _use_matplotlib():
        return None
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
    rooflines = {row["name"]: float(row["roofline_ms"]) for row in timed if row["roofline_ms"]}
    if rooflines:
        heights = [names.index(name) for name in rooflines]
        axes.scatter(list(rooflines.values()), heights, marker="|", s=300, color="black", label="roofline")
    axes.set(xscale="log", xlabel="milliseconds per search (median)", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, [axes], path)


def _use_matplotlib() -> bool:
    """Whether matplotlib is installed; it then draws without a display."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def _names(rows: list[Row]) -> list[str]:
    present = {row["provider"] for row in rows}
    return [name for name in COLORS if name in present]


def _line(axes: Any, points: list[tuple[int, float]], name: str, style: str = "-", label: str | None = None) -> None:
    if points:
        width = 2.2 if name == "revq" else 1.4
        looks = {"linestyle": style, "color": COLORS.get(name), "linewidth": width}
        looks["marker"] = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), label=label or name, **looks)


def _code_ticks(axes: Any, codes: list[int]) -> None:
    axes.set_xticks(codes, [f"{code // 1024}k" if code >= 1024 else str(code) for code in codes])
    axes.minorticks_off()


def _save(figure: Any, panels: Any, path: Path) -> Path:
    import matplotlib
    from matplotlib import pyplot

    # the same file for the same rows; text as text, which is a tenth of the size of its outlines
    matplotlib.rcParams.update({"svg.hashsalt": path.name, "svg.fonttype": "none"})
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    figure.tight_layout()
    figure.legend(found.values(), found.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    # a smaller file: coordinates to a tenth of a point, no comments, no indentation
    text = re.sub(r"<!--.*?-->\n", "", re.sub(r"(\d\.\d)\d+", r"\1", path.read_text()))
    path.write_text("".join(line.strip() + "\n" for line in text.splitlines()))
    return path
