"""Puts the committed rows into docs/benchmarks.md and docs/drop-in.md, between their markers.

python -m benchmarks.harness.report
"""

import re
from pathlib import Path

from benchmarks.cpu_report import acceptance_table, memory_table, search_table, soak_table, wrong_table
from benchmarks.drop_in.table import PAGE as DROP_IN_PAGE
from benchmarks.drop_in.table import drop_in_table
from benchmarks.gpu_report import gpu_section
from benchmarks.harness.plots import plots
from benchmarks.tables import PAGE, markdown, read, source

PICTURES = ("vae", "quantized", "rectified")


def reset_table() -> str:
    """The demo's quantizer with reset and without."""
    rows = read("reset-effect")
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


def rectifier_table() -> str:
    """The rectifiers on the demo's latents."""
    rows = read("rectifier-effect")
    keys = ["rectifier", "form", "parameters", "held_out_quantized_mse", "held_out_rectified_mse"]
    lines = [[*(row[key] for key in keys), f"{row['gain_percent']} %"] for row in rows]
    header = ["rectifier", "form", "parameters", "held-out MSE, quantized", "rectified", "gain"]
    return markdown(header, lines) + source(rows[0])


def demo_table() -> str:
    """The demo, one line per seed."""
    rows = read("demo-cpu")
    lines = []
    for row in rows:
        pictures = [f"{float(row[f'{name}_psnr']):.2f} / {float(row[f'{name}_ssim']):.4f}" for name in PICTURES]
        errors = [f"{float(row[f'latent_mse_{name}']):.4f}" for name in PICTURES[1:]]
        gain, used = (f"{100 * float(row[key]):.1f} %" for key in ("rectifier_gain", "utilization"))
        seconds = sum(float(value) for key, value in row.items() if key.startswith("seconds_"))
        lines.append([row["seed"], *pictures, " -> ".join(errors), gain, used, f"{seconds:.0f}"])
    header = ["seed", *(f"{name}, PSNR / SSIM" for name in PICTURES), "latent MSE", "gain", "utilization", "seconds"]
    return markdown(header, lines) + source(rows[0])


def demo_search_table() -> str:
    """The demo's searches with an older commit's kernels and with this one's."""
    rows = read("demo-search")
    keys = [key for key in rows[0] if key.endswith(" ms")]
    lines = [[row["kernels"], row["of"], *(row[key] for key in keys)] for row in rows]
    return markdown(["kernels", "commit", *keys], lines) + source(rows[0])


def demo_speed_table() -> str:
    """The demo of an older commit and of this one, stage by stage."""
    rows = read("demo-speed")
    header = [
        "freed memory",
        "stage",
        f"before ({rows[0]['before']}) s",
        "now s",
        "now / before",
        "shorter now, of rounds",
    ]
    lines = [
        [
            row["freed memory"],
            row["stage"],
            row["before s"],
            row["now s"],
            row["now / before"],
            f"{row['shorter now']} of {row['rounds']}",
        ]
        for row in rows
    ]
    return markdown(header, lines) + source(rows[0])


def main() -> None:
    """Rewrite the pages."""
    tables = {
        "acceptance": acceptance_table(),
        "soak": soak_table(),
        "search": search_table(),
        "wrong": wrong_table(),
        "plots": plots(),
        "search-gpu": gpu_section(),
        "memory": memory_table(),
        "reset": reset_table(),
        "rectifier": rectifier_table(),
        "demo": demo_table(),
        "demo-speed": demo_speed_table(),
        "demo-search": demo_search_table(),
    }
    rewrite(PAGE, tables)
    rewrite(DROP_IN_PAGE, {"drop-in": drop_in_table()})


def rewrite(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its markers."""
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    main()
