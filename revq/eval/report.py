"""Output for people: plain text tables, sheets of images side by side, a plot of the losses."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revq.data.atomic import atomic_file, check_writable_file, temporary_folder
from revq.data.images import to_pil, to_tensor
from revq.eval.evaluate import LABELS, Quality, image_quality, reconstruct

if TYPE_CHECKING:
    from PIL.Image import Image

    from revq.data.vae import FrozenVAE
    from revq.model.revq import ReVQ

    Columns = Sequence[tuple[str, Sequence[Image]]]

ROWS_PER_PAGE = 16
_GAP, _TITLE, _CAPTION = 4, 22, 16  # pixels: between pictures; height of a column's title and of a row's file name


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


def comparison(columns: "Columns", names: Sequence[str] | None = None) -> "Image":
    """A sheet with one labeled column per entry and one row per image.

    Args:
        columns: (label, images); all images have one size, all columns one length.
        names: what stands under each row, such as the name of the image's file.

    Raises:
        ValueError: if there is no image, or the columns, sizes or number of names differ.
    """
    from PIL import Image, ImageDraw, ImageFont

    lengths = {len(images) for _, images in columns} | ({len(names)} if names is not None else set())
    sizes = {image.size for _, images in columns for image in images}
    if len(lengths) != 1 or len(sizes) != 1:
        raise ValueError(f"columns: expected equally many images of one size, got {lengths} images of sizes {sizes}")
    (rows,), ((width, height),) = lengths, sizes
    step = height + _GAP + (_CAPTION if names is not None else 0)
    sheet = Image.new("RGB", (len(columns) * (width + _GAP) + _GAP, _TITLE + rows * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, images) in enumerate(columns):
        left = _GAP + column * (width + _GAP)
        draw.text((left + width / 2, _TITLE / 2), label, fill="black", anchor="mm", font=ImageFont.load_default(14))
        for row, image in enumerate(images):
            sheet.paste(image, (left, _TITLE + row * step))
    font = ImageFont.load_default(11)
    for row, name in enumerate(names or ()):
        text = _fit(name, lambda text: font.getlength(text) <= sheet.width - 2 * _GAP)
        draw.text((_GAP, _TITLE + row * step + height + _CAPTION / 2), text, fill="black", anchor="lm", font=font)
    return sheet


def save_comparison(path: str | Path, columns: "Columns", names: Sequence[str] | None = None) -> None:
    """Write `comparison` as a PNG, atomically."""
    sheet = comparison(columns, names)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def page_paths(path: str | Path, rows: int) -> list[Path]:
    """The files of pages with so many rows in all: ``path`` itself, then ``name-2.png``, ``name-3.png``, ... beside it."""
    path, pages = Path(path), -(-rows // ROWS_PER_PAGE)
    return [path, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, pages + 1))]


def reconstruction_sheets(
    model: "ReVQ",
    vae: "FrozenVAE",
    images: "Iterator[tuple[str, Image]]",
    qualities: list[tuple[int, dict[str, Quality]]],
) -> "Iterator[Image]":
    """One sheet for every `ROWS_PER_PAGE` images, beside their reconstructions; holds the images of one sheet at a time.

    Args:
        model: the model.
        vae: its VAE.
        images: names and square images.
        qualities: grows by (images, `image_quality`) with each sheet.
    """
    while page := list(itertools.islice(images, ROWS_PER_PAGE)):
        pictures = reconstruct(model, vae, to_tensor([image for _, image in page]))
        qualities.append((len(page), image_quality(pictures)))
        columns = [(label, to_pil(column)) for label, column in zip(LABELS, pictures, strict=True)]
        yield comparison(columns, [name for name, _ in page])


def save_pages(paths: Sequence[Path], sheets: "Iterator[Image]") -> list[Path]:
    """Write one PNG per sheet, all or none: they get their names when the last one is drawn.  Holds one at a time.

    Args:
        paths: for at least as many pages as there are sheets.
        sheets: the pages.

    Returns:
        The paths that were written.
    """
    with temporary_folder(paths[0]) as folder:
        pages = []
        for path, sheet in zip(paths, sheets, strict=False):
            pages.append(path)
            sheet.save(folder / path.name, format="PNG")
        for path in pages:
            os.replace(folder / path.name, check_writable_file(path))  # noqa: PTH105 - the system call
    return pages


def _fit(name: str, fits: Callable[[str], bool]) -> str:
    """A file name as printable text, its beginning cut off until it fits."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name[-300:])
    shown = text
    while not fits(shown) and len(text) > 1:
        text = text[1:]
        shown = "..." + text
    return shown


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
