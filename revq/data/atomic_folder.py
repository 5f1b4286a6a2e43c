"""Write a small folder whole or not at all, in place of an older one if there is one."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revq.data.atomic import sync
from revq.errors import InputError


@contextmanager
def atomic_folder(target: str | Path, replaceable: frozenset[str]) -> Iterator[Path]:
    """Yield a new folder beside ``target``; when the block ends well it becomes ``target``, else it is removed.

    Args:
        target: may exist, if it holds nothing but files named in ``replaceable``; all of them go.
        replaceable: names of files that a folder of this kind may hold.

    Raises:
        InputError: if ``target`` is a file, or holds anything else, which replacing would delete.
    """
    target = Path(target).absolute()
    check_replaceable(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.tmp")  # one name, so that the next write clears what a killed one left
    _remove(new)
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            sync(path)
        sync(new)
        if not target.exists():
            new.rename(target)
        else:
            check_replaceable(target, replaceable)
            _exchange(new, target)
        sync(target.parent)
    finally:
        _remove(new)  # after an exchange, this is the old folder


def check_replaceable(target: Path, replaceable: frozenset[str]) -> None:
    """What `atomic_folder` checks, for callers that want to know before they begin.

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
    """Swap two folders: in one step where the system can (Linux), else with a moment in which ``target`` is away."""
    if not _renameat2_exchange(new, target):
        aside = new.with_name(new.name + ".old")
        _remove(aside)
        target.rename(aside)
        new.rename(target)
        aside.rename(new)


def _renameat2_exchange(new: Path, target: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where the C library or file system lacks it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(target), rename_exchange) == 0


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
