"""Make the demo photos in `revq/assets/photos` from two Debian packages.

Downloads the packages without installing them, keeps the photos whose author and free license the packages name, drops
near-duplicates, splits the rest into training and held-out photos, and writes

* `revq/assets/photos/train/*.webp` and `revq/assets/photos/held_out/*.webp`, short side at most 256 pixels,
* `revq/assets/photos/SOURCES.csv`, one row per photo: author, license, origin, changes.

Needs Debian's apt-get and dpkg:  python scripts/fetch_photos.py
"""

import argparse
import csv
import io
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).resolve().parent.parent / "revq" / "assets" / "photos"
GCOMPRIS, LOMIRI = "gcompris-qt-data", ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
LOMIRI_HOME = "https://gitlab.com/ubports/development/core/lomiri-wallpapers"
RESOURCES = (
    "categorization", "clickgame", "details", "erase", "explore_farm_animals", "explore_monuments",
    "explore_world_animals", "explore_world_music",
)  # fmt: skip
# Free images that are not photos: paintings, letter blocks, renderings, patterns, and photos of flat graphics.
NOT_PHOTOS = re.compile(
    r"images/(alphabets|numbers)/|Gogh|Eglise_dAuvers|PereTanguy|others/(blackslate|erasers|volleyball)"
    r"|analogpattern|greentock|umang|Fossa|Infinite-Sea|Painting-Colors"
)
HELD_OUT = 48
SHORT_SIDE, SMALLEST = 256, 128
COLUMNS = ("file", "split", "package", "version", "path", "author", "license", "license_url", "source", "changes")
# Licenses under which a photo may ship with the package, with the address of the text. The names are SPDX ids, except
# for the public domain, which SPDX does not list.
FREE_LICENSES = {
    "public-domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    **{f"CC-BY-{v}": f"https://creativecommons.org/licenses/by/{v}/" for v in ("1.0", "2.0", "2.5", "3.0", "4.0")},
    **{f"CC-BY-SA-{v}": f"https://creativecommons.org/licenses/by-sa/{v}/" for v in ("2.0", "2.5", "3.0", "4.0")},
}
IMAGE_SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
NO_AUTHOR = (
    "",
    "anonymous",
    "contributor",
    "el.wikipedia",
    "none",
    "unknown",
)  # entries that are not the name of a person
_FIELD = re.compile(r"(Files|Copyright|License|Source|Comments?):\s*(.*)")
_ADAPTED = re.compile(r"based on an? .*?by (?P<author>.+?),? licen[sc]e (?P<license>[^,]+), source at (?P<url>\S+)")


@dataclass
class Credit:
    """The credits of one image in its package: author, license, origin, and changes made by the package."""

    author: str
    license: str
    source: str
    changes: str

    @property
    def free(self) -> bool:
        """Whether an author is named and the license permits redistribution."""
        return self.author.lower() not in NO_AUTHOR and self.license in FREE_LICENSES


def download(package: str, cache: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package without installing it; return its folder and its version."""
    debs, root = cache / "debs", cache / "unpacked" / package
    debs.mkdir(parents=True, exist_ok=True)
    if not any(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
    deb = max(debs.glob(f"{package}_*.deb"))
    if not root.exists():
        root.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    version = subprocess.run(["dpkg-deb", "-f", str(deb), "Version"], check=True, capture_output=True, text=True)
    return root, version.stdout.strip()


def read_rcc(blob: bytes) -> dict[str, bytes]:
    """Return the files in a Qt binary resource (`.rcc`) as {path: content}.

    The header holds the offsets of a node tree, of the payloads and of the names. A directory node gives the count
    and the index of its children; a file node the offset of its payload.
    """
    magic, version, tree, data, names = struct.unpack_from(">4s4I", blob)
    if magic != b"qres":
        raise ValueError("not a Qt resource file")
    node_size = 22 if version >= 2 else 14  # from version 2 a node ends with a time stamp
    files = {}

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", blob, names + offset)
        return blob[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def visit(index: int, prefix: str) -> None:
        at = tree + index * node_size
        name_offset, flags = struct.unpack_from(">IH", blob, at)
        path = prefix + name_at(name_offset) if index else ""
        if flags & 2:  # a directory
            count, first = struct.unpack_from(">II", blob, at + 6)
            for child in range(first, first + count):
                visit(child, path + "/" if path else "")
            return
        (offset,) = struct.unpack_from(">I", blob, at + 10)
        (size,) = struct.unpack_from(">I", blob, data + offset)
        payload = blob[data + offset + 4 : data + offset + 4 + size]
        files[path] = zlib.decompress(payload[4:]) if flags & 1 else payload

    visit(0, "")
    return files


def parse_credits(text: str) -> dict[str, Credit]:
    """Return {file: credit} from a text of `Copyright:`, `License:`, `Source:` and `Files:` paragraphs.

    Machine-readable Debian copyright files and the README files beside GCompris's images have this form. Some README
    paragraphs list their files directly below the license, so files are read from there too.
    """
    found = {}
    for paragraph in re.split(r"\n\s*\n", text):
        fields, key = {}, ""
        for line in paragraph.splitlines():
            if match := _FIELD.match(line.strip()):
                key = match[1].lower().removesuffix("s")
                fields[key] = [match[2].strip()]
            elif key and line.strip():
                fields[key].append(line.strip())
        listed = " ".join(fields.get("file", []) + fields.get("license", [])[1:]).split()
        if not listed or "license" not in fields:
            continue
        authors = [clean_author(line) for line in fields.get("copyright", [])]
        author = "; ".join(dict.fromkeys(name for name in authors if name))
        source, changes = " ".join(fields.get("source", [])), " ".join(fields.get("comment", []))
        license = spdx(fields["license"][0])
        if adapted := _ADAPTED.search(changes):  # name the photographer first, then the person who adapted the photo
            author, source = f"{clean_author(adapted['author'])} (adapted by {author})", adapted["url"]
            changes = f"adapted from an original under {spdx(adapted['license'])}"
            if spdx(adapted["license"]) not in FREE_LICENSES:
                license = "unclear"
        for name in listed:
            if name.lower().endswith(IMAGE_SUFFIXES):
                found[name] = Credit(author, license, source, changes)
    return found


def clean_author(line: str) -> str:
    """Remove years, mail addresses and punctuation around a copyright holder's name."""
    line = re.sub(r"<[^>]*>", "", line)
    line = re.sub(r"\b(19|20)\d\d\b([-,\s]+(19|20)\d\d\b)*", "", line)
    name = " ".join(line.split()).strip(" .,;©")
    return name.strip('"') if name.count('"') == 2 and name[0] == name[-1] else name


def spdx(license: str) -> str:
    """Return the SPDX id of a license written as "CC-BY-SA 4.0", "Public Domain" and the like."""
    name = "-".join(license.split())
    return {"public-domain": "public-domain", "cc0": "CC0-1.0"}.get(name.lower(), name)


def gcompris_images(root: Path):
    """Yield (path, bytes, credit) for every WebP image of the GCompris resources.

    The credits are read from the README files beside the images. The package's Debian copyright file describes the
    images of an older release, which had other photos under the same names.
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
