"""Read the Debian packages that hold the demo photos: Qt resource files and machine-readable copyright files.

Pure standard library. `fetch_photos.py` uses it to find every photo together with its author and licence.
"""

import fnmatch
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

# The licences under which a photo may ship with the package, each with its SPDX id (or, for the public domain,
# which SPDX does not list, a plain name) and the address of its text.
FREE_LICENCES = {
    "public-domain": ("public-domain", "https://creativecommons.org/publicdomain/mark/1.0/"),
    "CC0-1.0": ("CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "CC-BY-1.0": ("CC-BY-1.0", "https://creativecommons.org/licenses/by/1.0/"),
    "CC-BY-2.0": ("CC-BY-2.0", "https://creativecommons.org/licenses/by/2.0/"),
    "CC-BY-2.5": ("CC-BY-2.5", "https://creativecommons.org/licenses/by/2.5/"),
    "CC-BY-3.0": ("CC-BY-3.0", "https://creativecommons.org/licenses/by/3.0/"),
    "CC-BY-4.0": ("CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "CC-BY-SA-2.0": ("CC-BY-SA-2.0", "https://creativecommons.org/licenses/by-sa/2.0/"),
    "CC-BY-SA-2.5": ("CC-BY-SA-2.5", "https://creativecommons.org/licenses/by-sa/2.5/"),
    "CC-BY-SA-3.0": ("CC-BY-SA-3.0", "https://creativecommons.org/licenses/by-sa/3.0/"),
    "CC-BY-SA-4.0": ("CC-BY-SA-4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
}


@dataclass
class Stanza:
    """One `Files:` paragraph of a Debian copyright file."""

    patterns: list[str]
    author: str
    licence: str
    comment: str


@dataclass
class Photo:
    """One image in a package, with what the package's copyright file says of it."""

    package: str
    version: str
    path: str
    data: bytes
    author: str
    licence: str
    source: str

    @property
    def free(self) -> bool:
        """Whether the photo names an author and stands under a licence that lets it ship."""
        return bool(self.author) and self.licence in FREE_LICENCES


def download(package: str, cache: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package without installing it; return its folder and its version."""
    debs, root = cache / "debs", cache / "unpacked" / package
    debs.mkdir(parents=True, exist_ok=True)
    if not any(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
    deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
    if not root.exists():
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


def parse_copyright(text: str) -> list[Stanza]:
    """Return the `Files:` paragraphs of a machine-readable Debian copyright file, in order."""
    stanzas = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields, key = {}, ""
        for line in paragraph.splitlines():
            if match := re.match(r"([A-Za-z-]+):\s*(.*)", line):
                key = match[1].lower()
                fields[key] = [match[2]]
            elif key:
                fields[key].append(line.strip())
        if "files" in fields:
            authors = [clean_author(line) for line in fields.get("copyright", []) if line.strip()]
            stanzas.append(
                Stanza(
                    patterns=" ".join(fields["files"]).split(),
                    author="; ".join(dict.fromkeys(a for a in authors if a)),
                    licence=(fields.get("license") or [""])[0].strip(),
                    comment=" ".join(fields.get("comment", [])).strip(),
                )
            )
    return stanzas


def clean_author(line: str) -> str:
    """Strip the years, the mail addresses and the stray punctuation around a copyright holder's name."""
    line = re.sub(r"<[^>]*>", "", line)
    line = re.sub(r"\b(19|20)\d\d\b([-,\s]*(19|20)\d\d\b)*", "", line)
    return line.strip(" .,;\"'´\t")


def stanza_for(path: str, stanzas: list[Stanza]) -> Stanza | None:
    """Return the last stanza that matches `path`, as the Debian copyright format prescribes."""
    found = None
    for stanza in stanzas:
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in stanza.patterns):
            found = stanza
    return found
