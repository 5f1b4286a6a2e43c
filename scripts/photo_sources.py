"""Read the Debian packages that hold the demo photos: Qt resource files, and the credits that come with the photos.

Pure standard library. `fetch_photos.py` uses it to find every photo together with its author and license.
"""

import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

# Every license under which a photo may ship with the package, with the address of its text. The names are SPDX ids,
# but for the public domain, which SPDX does not list.
FREE_LICENSES = {
    "public-domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    **{f"CC-BY-{v}": f"https://creativecommons.org/licenses/by/{v}/" for v in ("1.0", "2.0", "2.5", "3.0", "4.0")},
    **{f"CC-BY-SA-{v}": f"https://creativecommons.org/licenses/by-sa/{v}/" for v in ("2.0", "2.5", "3.0", "4.0")},
}
IMAGE_SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
NO_AUTHOR = ("", "anonymous", "contributor", "el.wikipedia", "none", "unknown")  # what stands where no name does
_FIELD = re.compile(r"(Files|Copyright|License|Source|Comments?):\s*(.*)")
_ADAPTED = re.compile(r"based on an? .*?by (?P<author>.+?),? licen[sc]e (?P<license>[^,]+), source at (?P<url>\S+)")


@dataclass
class Credit:
    """What a package says of one image: who made it, under which license, where it is from, what was done to it."""

    author: str
    license: str
    source: str
    changes: str

    @property
    def free(self) -> bool:
        """Whether an author is named and the license lets the image ship."""
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

    Both a machine-readable Debian copyright file and the README files that GCompris keeps beside its images have this
    form. Some README paragraphs list their files right under the license, so files are taken from there too.
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
        if adapted := _ADAPTED.search(changes):  # the photographer comes first, then who adapted the photo
            author, source = f"{clean_author(adapted['author'])} (adapted by {author})", adapted["url"]
            changes = f"adapted from an original under {spdx(adapted['license'])}"
            if spdx(adapted["license"]) not in FREE_LICENSES:
                license = "unclear"
        for name in listed:
            if name.lower().endswith(IMAGE_SUFFIXES):
                found[name] = Credit(author, license, source, changes)
    return found


def clean_author(line: str) -> str:
    """Strip the years, the mail addresses and the stray punctuation around a copyright holder's name."""
    line = re.sub(r"<[^>]*>", "", line)
    line = re.sub(r"\b(19|20)\d\d\b([-,\s]+(19|20)\d\d\b)*", "", line)
    name = " ".join(line.split()).strip(" .,;©")
    return name.strip('"') if name.count('"') == 2 and name[0] == name[-1] else name


def spdx(license: str) -> str:
    """Return the SPDX id of a license written as "CC-BY-SA 4.0", "Public Domain" and the like."""
    name = "-".join(license.split())
    return {"public-domain": "public-domain", "cc0": "CC0-1.0"}.get(name.lower(), name)
