"""Write a file, or a small folder, whole or not at all: under a temporary name first, then renamed in one step."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from revq.errors import InputError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` if the block succeeds and is removed if it fails.

    A process killed inside the block leaves ``path`` unchanged.  The temporary name is always the same, so the next
    write reuses what a killed process left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # follows the user's umask; some libraries create files with mode 0600
        yield temporary
        temporary.chmod(mode)
        _flush_to_disk(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - named like the system call that makes this atomic
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _flush_to_disk(path.parent)


@contextmanager
def atomic_folder(target: str | Path, replaceable: frozenset[str]) -> Iterator[Path]:
    """Yield a new folder beside ``target``; it becomes ``target`` if the block succeeds and is removed if it fails.

    Args:
        target: may exist if it holds only files named in ``replaceable``; then all of them are replaced.
        replaceable: names of files that a folder of this kind may hold.

    Raises:
        InputError: if ``target`` is a file, or holds anything else, which replacing would delete.
    """
    target = Path(target).absolute()
    check_replaceable(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.tmp")  # a fixed name, so that the next write removes a killed one's rest
    _remove(new)
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            _flush_to_disk(path)
        _flush_to_disk(new)
        if not target.exists():
            new.rename(target)
        else:
            check_replaceable(target, replaceable)
            _exchange(new, target)
        _flush_to_disk(target.parent)
    finally:
        _remove(new)  # after an exchange, this is the old folder


def check_replaceable(target: Path, replaceable: frozenset[str]) -> None:
    """The check of `atomic_folder`, for callers that should fail before they do any work.

    Raises:
        InputError: if ``target`` is a file, or holds anything but files named in ``replaceable``.
    """
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in replaceable or not path.is_file())
        if foreign:
            older = ", or an older one of the same kind" if replaceable else ""
            raise InputError(f"{target}: expected a new or empty folder{older}, but it holds {foreign[0]}")
    elif target.exists():
        raise InputError(f"{target}: expected a folder to write to, found a file")


def _exchange(new: Path, target: Path) -> None:
    """Swap the names of two folders.

    A rename cannot replace a folder that holds files, so replacing needs either two renames, between which no ``target``
    exists, or the swap that Linux offers as one system call.  The second is used where it works.
    """
    if not _exchange_in_one_step(new, target):
        aside = new.with_name(new.name + ".old")
        _remove(aside)
        target.rename(aside)
        new.rename(target)  # a process killed before this line leaves the old folder under the name `aside`
        aside.rename(new)


def _exchange_in_one_step(new: Path, target: Path) -> bool:
    """Linux's renameat2(..., RENAME_EXCHANGE), which Python's `os` does not offer.

    Returns:
        False, with nothing changed, where the C library or the file system lacks it.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2  # of fcntl.h: relative paths start at the working directory; the swap
    return renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(target), rename_exchange) == 0


def _flush_to_disk(path: Path) -> None:
    """Have the system write a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
