"""Make the demo photos in `revq/assets/photos` from two Debian packages.

Downloads the packages (nothing is installed), keeps the real photos whose author and free license the packages name,
drops near-duplicates, splits them, and writes

* `revq/assets/photos/train/*.webp` and `revq/assets/photos/held_out/*.webp`, short side at most 256 pixels,
* `revq/assets/photos/SOURCES.csv`, one row a photo: author, license, origin, what was changed.

Needs Debian's apt-get and dpkg:  python scripts/fetch_photos.py
"""

import argparse
import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from photo_sources import FREE_LICENSES, Credit, download, parse_credits, read_rcc
from PIL import Image

PHOTOS = Path(__file__).resolve().parent.parent / "revq" / "assets" / "photos"
GCOMPRIS, LOMIRI = "gcompris-qt-data", ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
LOMIRI_HOME = "https://gitlab.com/ubports/development/core/lomiri-wallpapers"
RESOURCES = (
    "categorization", "clickgame", "details", "erase", "explore_farm_animals", "explore_monuments",
    "explore_world_animals", "explore_world_music",
)  # fmt: skip
# Free images that are no photos: paintings, letter blocks, renderings, patterns, and photos of flat graphics.
NOT_PHOTOS = re.compile(
    r"images/(alphabets|numbers)/|Gogh|Eglise_dAuvers|PereTanguy|others/(blackslate|erasers|volleyball)"
    r"|analogpattern|greentock|umang|Fossa|Infinite-Sea|Painting-Colors"
)
HELD_OUT = 48
SHORT_SIDE, SMALLEST = 256, 128
COLUMNS = ("file", "split", "package", "version", "path", "author", "license", "license_url", "source", "changes")


def gcompris_images(root: Path):
    """Yield (path, bytes, credit) for every WebP image of the GCompris resources.

    The package's Debian copyright file still describes the images of an older release, which had other photos under
    the same names. The README files that lie beside the images are the ones that match them, so they are used.
    """
    for name in RESOURCES:
        files = read_rcc((root / f"usr/share/gcompris-qt/rcc/{name}.rcc").read_bytes())
        found = {}
        for path, data in files.items():
            if path.endswith("/README"):
                folder = path.removesuffix("README")
                found |= {folder + file: credit for file, credit in parse_credits(data.decode()).items()}
        for path in sorted(files):
            if path.endswith(".webp"):
                yield f"{name}.rcc:{path}", files[path], found.get(path)


def lomiri_images(root: Path, package: str):
    """Yield (path, bytes, credit) for the wallpapers, whose Debian copyright file names each author."""
    found = parse_credits((root / f"usr/share/doc/{package}/copyright").read_text())
    by_name = {Path(file).name: replace(credit, source=LOMIRI_HOME) for file, credit in found.items()}
    for path in sorted((root / "usr/share/backgrounds").glob("*.jpg")):
        yield str(path.relative_to(root)), path.read_bytes(), by_name.get(path.name)


def fingerprint(image: Image.Image) -> np.ndarray:
    """Return the signs of the brightness steps in a 17x16 thumbnail: nearly the same for near-duplicates."""
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Scale an image down to the given short side; an image that is smaller stays as it is."""
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    return image.resize([max(short_side, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def collect(cache: Path) -> list[tuple[dict, Image.Image]]:
    """Return a row and an image for every usable photo, in a fixed order."""
    rows, prints = [], []
    for package in (GCOMPRIS, *LOMIRI):
        root, version = download(package, cache)
        images = gcompris_images(root) if package == GCOMPRIS else lomiri_images(root, package)
        for path, data, credit in images:
            if not (credit and credit.free) or NOT_PHOTOS.search(path):
                continue
            image = Image.open(io.BytesIO(data))
            if image.mode != "RGB" or min(image.size) < SMALLEST:
                continue
            mark = fingerprint(image)
            if any((mark != other).mean() < 0.12 for other in prints):
                print(f"near-duplicate, dropped: {path}")
                continue
            prints.append(mark)
            rows.append((make_row(package, version, path, credit), image))
    return rows


def make_row(package: str, version: str, path: str, credit: Credit) -> dict:
    """Return one line of SOURCES.csv, but for the split."""
    group = path.split(".rcc:")[0] if ".rcc:" in path else "lomiri"
    stem = re.sub(r"\W+", "-", f"{group}-{Path(path).stem}".lower()).replace("_", "-").removesuffix("-background")
    changes = "resized, re-encoded as WebP"
    if credit.changes:
        changes += f"; before that, by the package: {credit.changes}"
    return {
        "file": f"{stem}.webp", "package": package, "version": version, "path": path, "author": credit.author,
        "license": credit.license, "license_url": FREE_LICENSES[credit.license], "source": credit.source,
        "changes": changes,
    }  # fmt: skip


def main() -> None:
    """Fetch, select, split and write the photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/photos"), help="folder for the downloads")
    parser.add_argument("--quality", type=int, default=85, help="WebP quality of the shipped photos")
    args = parser.parse_args()
    photos = collect(args.cache)
    # Evenly spaced places in the fixed order: every source gives held-out photos in proportion to its size.
    held_out = {int((i + 0.5) * len(photos) / HELD_OUT) for i in range(HELD_OUT)}
    for split in ("train", "held_out"):
        (PHOTOS / split).mkdir(parents=True, exist_ok=True)
        for old in (PHOTOS / split).glob("*.webp"):
            old.unlink()
    with (PHOTOS / "SOURCES.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for i, (row, image) in enumerate(photos):
            row["split"] = "held_out" if i in held_out else "train"
            writer.writerow(row)
            target = PHOTOS / row["split"] / row["file"]
            if target.exists():
                raise FileExistsError(f"two photos would share the name {target.name}")
            shrink(image, SHORT_SIDE).save(target, "WEBP", quality=args.quality, method=6)
    size = sum(path.stat().st_size for path in PHOTOS.rglob("*.webp"))
    print(f"{len(photos) - len(held_out)} training and {len(held_out)} held-out photos, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
