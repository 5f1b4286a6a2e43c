"""Output for people: plain text tables, a sheet of images side by side, a plot of the losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revq.data.atomic import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: the first column left-aligned, the others right-aligned, a rule under the header.

    Raises:
        ValueError: if a row has more or fewer cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: expected {len(header)} cells, got {row}")
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A plain text list of names and values in two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def save_comparison(path: str | Path, columns: Sequence[tuple[str, Sequence["Image"]]]) -> None:
    """Write a PNG with one labeled column per entry and one row per image, atomically.

    Args:
        path: the PNG file.
        columns: (label, images); all images have one size, all columns one length.

    Raises:
        ValueError: if there is no image, or the columns or sizes differ.
    """
    from PIL import Image, ImageDraw, ImageFont

    lengths = {len(images) for _, images in columns}
    sizes = {image.size for _, images in columns for image in images}
    if len(lengths) != 1 or len(sizes) != 1:
        raise ValueError(f"columns: expected equally many images of one size, got {lengths} images of sizes {sizes}")
    (rows,), ((width, height),) = lengths, sizes
    gap, strip = 4, 22
    sheet = Image.new("RGB", (len(columns) * (width + gap) + gap, strip + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns):
        left = gap + column * (width + gap)
        draw.text((left + width / 2, strip / 2), label, fill="black", anchor="mm", font=ImageFont.load_default(14))
        for row, image in enumerate(images):
            sheet.paste(image, (left, strip + row * (height + gap)))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def save_loss_plot(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with a run's losses over its steps, from the records of its log (`revq.train.read_records`), atomically."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,  # not pyplot, which has global state and needs a display
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [record for record in records if record.get("kind") == "step"]
    epochs = [record for record in records if record.get("kind") == "epoch"]
    for name, label, color in (
        ("quantizer_loss", "training, quantized", "tab:orange"),
        ("rectifier_loss", "training, rectified", "tab:blue"),
    ):
        axes.plot([r["step"] for r in steps], [r[name] for r in steps], color=color, alpha=0.5, label=label)
    for name, label, color in (
        ("validation_quantized", "held-out, quantized", "tab:orange"),
        ("validation_rectified", "held-out, rectified", "tab:blue"),
    ):
        seen = [r for r in epochs if r.get(name) is not None]
        if seen:
            axes.plot([r["step"] for r in seen], [r[name] for r in seen], "o--", color=color, label=label)
    axes.set(xlabel="step", ylabel="latent MSE (normalized)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
