"""Write a file whole or not at all: to a temporary neighbor, to the disk, then into place in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well it becomes ``path``, else it is removed.

    A process killed inside the block leaves ``path`` as it was.  The temporary name is always the same, so the next
    write reuses what a killed process left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; some libraries write files for the owner alone
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - the one step that must be atomic, by its own name
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
