"""Draw docs/method.svg, the figure of docs/concepts.md.

python scripts/draw_concepts.py
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"svg.hashsalt": "revq", "svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}
)

INK, FROZEN, LEARNED, DATA = "#22313f", "#dfe6ea", "#ffe3b3", "#ffffff"
OUT = Path(__file__).parent.parent / "docs" / "method.svg"


def box(ax, x, y, width, text, color, height=0.9):
    """Draw one stage as a box."""
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.03", fc=color, ec=INK, lw=1))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)


def arrow(ax, start, end, text="", style="-|>", dashed=False, above=0.12):
    """Draw an arrow from one stage to the next."""
    line = "--" if dashed else "-"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, color=INK, lw=1, linestyle=line))
    if text:
        ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, text, ha="center", fontsize=6.8, color=INK)


def pipeline(ax):
    """Draw the upper row: an image to tokens and back."""
    stages = [
        (0.0, 1.35, "VAE encoder\n(frozen)", FROZEN),
        (2.35, 1.35, "normalize", FROZEN),
        (4.7, 1.35, "channel split", DATA),
        (7.05, 1.6, "nearest code\nT codebooks", LEARNED),
        (9.65, 1.35, "merge", DATA),
        (12.0, 1.35, "rectifier g,\ndenormalize", LEARNED),
        (14.35, 1.35, "VAE decoder\n(frozen)", FROZEN),
    ]
    y = 3.4
    for x, width, text, color in stages:
        box(ax, x, y, width, text, color)
    shapes = ["[B,32,8,8]", "[B,32,8,8]", "[B,512,4]", "[B,512,4]", "[B,32,8,8]", "[B,32,8,8]"]
    for (x, width, *_), (following, *_), shape in zip(stages, stages[1:], shapes, strict=False):
        arrow(ax, (x + width + 0.05, y + 0.45), (following - 0.05, y + 0.45), shape)
    arrow(ax, (-0.95, y + 0.45), (-0.05, y + 0.45), "image")
    arrow(ax, (15.75, y + 0.45), (16.75, y + 0.45), "image")
    arrow(ax, (7.85, y), (7.85, 2.75))
    ax.text(7.85, 2.5, "tokens: indices [B,512] in [0, K)", ha="center", fontsize=8.5, weight="bold", color=INK)
    ax.add_patch(
        FancyArrowPatch(
            (5.4, y + 0.95),
            (7.85, y + 0.95),
            connectionstyle="arc3,rad=-0.35",
            arrowstyle="<->",
            mutation_scale=10,
            color="#b3541e",
            lw=1.1,
            linestyle="--",
        )
    )
    ax.text(6.6, y + 1.52, "loss 1: codebooks", ha="center", fontsize=8, color="#b3541e")
    ax.add_patch(
        FancyArrowPatch(
            (3.0, y + 0.95),
            (12.7, y + 0.95),
            connectionstyle="arc3,rad=-0.2",
            arrowstyle="<->",
            mutation_scale=10,
            color="#1e6fb3",
            lw=1.1,
            linestyle="--",
        )
    )
    ax.text(9.9, y + 1.98, "loss 2: rectifier", ha="center", fontsize=8, color="#1e6fb3")


def split(ax):
    """Draw the lower left: a latent channel is split into half rows."""
    x, y, cell = 0.2, 0.15, 0.2
    for row in range(8):
        for half in range(2):
            color = plt.cm.tab20((row * 2 + half) % 20)
            ax.add_patch(Rectangle((x + half * 4 * cell, y + (7 - row) * cell), 4 * cell, cell, fc=color, ec="white"))
    ax.text(
        x + 2.0,
        y + 1.25,
        "channel split: each of the 32 channels (8 x 8)\nis split into 16 half rows of d = 4 elements:\n"
        "512 tokens, and each token position\nhas its own codebook",
        va="center",
        fontsize=8,
        color=INK,
    )


def reset(ax):
    """Draw the lower right: dead codes move next to used ones."""
    x, y = 9.2, 0.2
    for i, count in enumerate((9, 7, 3, 1, 0, 0)):
        ax.add_patch(
            Rectangle((x + i * 0.55, y), 0.38, 0.08 + count * 0.17, fc=LEARNED if count else "#cccccc", ec=INK)
        )
        ax.text(x + i * 0.55 + 0.19, y - 0.17, str(count), ha="center", fontsize=7, color=INK)
    for dead, busy, top in ((5, 0, 1.75), (4, 1, 1.4)):
        arrow(ax, (x + dead * 0.55 + 0.19, y + 0.15), (x + busy * 0.55 + 0.25, y + top), style="-|>", dashed=True)
    ax.text(
        x + 3.7,
        y + 0.95,
        "reset, once per epoch: a code that was never\nchosen moves next to the most used, plus noise\n"
        "(numbers: how often each code was chosen)",
        va="center",
        fontsize=8,
        color=INK,
    )


def main():
    """Draw and write the file."""
    figure, ax = plt.subplots(figsize=(14, 4.7))
    pipeline(ax)
    split(ax)
    reset(ax)
    for x, color, text in ((12.0, FROZEN, "frozen"), (13.2, LEARNED, "learned")):
        ax.add_patch(Rectangle((x, 2.6), 0.25, 0.2, fc=color, ec=INK))
        ax.text(x + 0.35, 2.7, text, va="center", fontsize=8, color=INK)
    ax.set(xlim=(-1.0, 16.9), ylim=(-0.15, 5.75))
    ax.axis("off")
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
