"""Which files of a folder are images, by one rule; what is left out is counted with its reason."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from revq.data.decode import image_suffixes, printable
from revq.errors import InputError

_HIDDEN = frozenset(
    name.casefold()
    for name in [
        "@eaDir",
        "@tmp",
        "@Recycle",
        "@Recently-Snapshot",
        "#recycle",
        "#snapshot",
        "__MACOSX",
        "$RECYCLE.BIN",
        "RECYCLER",
        "lost+found",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "__pycache__",
    ]
) | {"system volume information"}
"""Files and folders that file systems, servers and archivers add; beside all names that start with a dot."""

_REASONS_SHOWN = 6


class NamedFile(NamedTuple):
    """An image file, and its name as a path relative to the folder that was given."""

    name: str
    path: Path


class SkippedFile(NamedTuple):
    """A file or folder that is not read, and why; the name is relative and printable, a folder's ends in ``/``."""

    name: str
    reason: str


class ImageListing(NamedTuple):
    """The images of some places, and what lies beside them."""

    files: list[NamedFile]
    skipped: list[SkippedFile]

    def summary(self) -> str:
        """As `summarize` tells it."""
        return summarize(len(self.files), self.skipped)


def summarize(images: int, skipped: Sequence[SkippedFile]) -> str:
    """Like "7 images, 5 skipped (3 hidden, 2 not an image: .txt)", the most frequent reasons first."""
    return f"{images} image{'' if images == 1 else 's'}{_and_skipped(skipped)}"


def _and_skipped(skipped: Sequence[SkippedFile]) -> str:
    if not skipped:
        return ""
    reasons = sorted(Counter(file.reason for file in skipped).items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {reason}" for reason, count in reasons[:_REASONS_SHOWN]]
    if rest := sum(count for _, count in reasons[_REASONS_SHOWN:]):
        parts.append(f"{rest} for other reasons")
    return f", {len(skipped)} skipped ({', '.join(parts)})"


def image_files(places: Sequence[str | Path]) -> ImageListing:
    """The images of ``places``: files as they are, folders with their subfolders, each sorted by path.

    Of a folder, a file is read if its suffix is of a raster format that the installed Pillow decodes.  These are skipped,
    each with a reason:

    * names that start with a dot, and those that systems add (``@eaDir``, ``__MACOSX``, ``Thumbs.db``, ...);
    * names that are not UTF-8 or hold control characters, because stores and token files could not hold them;
    * broken links, folders and files without permission, FIFOs, sockets and devices.

    Links to files and folders are followed.  A folder that is reached by several ways is read once, by its path without
    links if there is one; a link to the folder itself or to one above it is skipped.

    Raises:
        InputError: if nothing is given, a place is missing, or a folder holds no image.
    """
    files: list[NamedFile] = []
    skipped: list[SkippedFile] = []
    for place in map(Path, places):
        if not _is(place, stat.S_ISREG):
            found = _list_folder(place)
            files += found.files
            skipped += found.skipped
        elif reason := _bad_name(place.name):
            skipped.append(SkippedFile(printable(place.name), reason))
        else:
            files.append(NamedFile(place.name, place))
    if not files:
        raise InputError(f"images: expected at least one file or folder, got none{_and_skipped(skipped)}")
    return ImageListing(files, skipped)


def list_images(folder: str | Path) -> list[Path]:
    """The images under ``folder`` and its subfolders, sorted by path, by the rule of `image_files`.

    Raises:
        InputError: if the folder is missing or holds no image.
    """
    return [file.path for file in _list_folder(Path(folder)).files]


def _list_folder(folder: Path) -> ImageListing:
    if not _is(folder, stat.S_ISDIR):
        kind = "a file" if _is(folder, stat.S_ISREG) else "something else" if os.path.lexists(folder) else "nothing"
        raise InputError(f"{printable(str(folder))}: expected a folder of images, found {kind}")
    walk = _Walk(folder)
    walk.run()
    if not walk.files:
        raise InputError(
            f"{printable(str(folder))}: expected at least one image, found none{_and_skipped(walk.skipped)}"
        )
    files = sorted(walk.files, key=lambda file: file.name.split("/"))
    return ImageListing(files, sorted(walk.skipped, key=lambda file: file.name.split("/")))


class _Walk:
    """One walk of a folder: first all that is reached without links, then the linked folders, in order of their paths."""

    def __init__(self, folder: Path) -> None:
        self.files: list[NamedFile] = []
        self.skipped: list[SkippedFile] = []
        self._root = folder
        self._read, self._unread = image_suffixes()
        above = folder.resolve().parents
        self._above = {_identity(parent.stat()) for parent in above}
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, ...]] = []

    def run(self) -> None:
        self._folders([()])
        while self._links:
            links, self._links = sorted(self._links), []
            for parts in links:
                if _identity(self._path(parts).stat()) in self._above:
                    self._skip(parts, "link to a folder above", folder=True)
                else:
                    self._folders([parts])

    def _folders(self, pending: list[tuple[str, ...]]) -> None:
        while pending:
            parts = pending.pop()
            try:
                identity = _identity(self._path(parts).stat())
                if identity in self._seen:
                    self._skip(parts, "link to a folder that is read already", folder=True)
                    continue
                self._seen.add(identity)
                with os.scandir(self._path(parts)) as entries:
                    found = list(entries)
            except OSError as error:
                self._skip(parts, f"folder that cannot be read: {error.strerror}", folder=True)
                continue
            pending += [(*parts, entry.name) for entry in found if self._is_folder((*parts, entry.name), entry)]

    def _is_folder(self, parts: tuple[str, ...], entry: "os.DirEntry[str]") -> bool:
        """Whether to go into ``entry`` now; sorts everything else."""
        reason: str | None = None
        mode = 0
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            reason = "broken link" if entry.is_symlink() else f"file that cannot be read: {error.strerror}"
        folder = stat.S_ISDIR(mode)
        if entry.name.startswith(".") or entry.name.casefold() in _HIDDEN:
            reason = "hidden"
        reason = reason or _bad_name(entry.name)
        if not reason and folder:
            if entry.is_symlink():
                self._links.append(parts)
            return not entry.is_symlink()
        if not reason and not stat.S_ISREG(mode):
            reason = "not a regular file"
        reason = reason or self._bad_file(entry)
        if reason:
            self._skip(parts, reason, folder=folder)
        else:
            self.files.append(NamedFile("/".join(parts), self._path(parts)))
        return False

    def _bad_file(self, entry: "os.DirEntry[str]") -> str | None:
        suffix = Path(entry.name).suffix.lower()
        if suffix not in self._read:
            kind = "format that is not read" if suffix in self._unread else "not an image"
            return f"{kind}: {suffix or 'no suffix'}"
        return None if os.access(entry.path, os.R_OK) else "file that cannot be read: Permission denied"

    def _skip(self, parts: tuple[str, ...], reason: str, *, folder: bool) -> None:
        self.skipped.append(SkippedFile(printable("/".join(parts) or ".") + ("/" if folder else ""), reason))

    def _path(self, parts: tuple[str, ...]) -> Path:
        return self._root.joinpath(*parts)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (OSError, ValueError):  # missing, unreachable, or no possible name
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _bad_name(name: str) -> str | None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        return "name that is not UTF-8"
    return "name with a control character" if any(ord(c) < 32 or ord(c) == 127 for c in name) else None
