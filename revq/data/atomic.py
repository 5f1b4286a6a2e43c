"""Write a file or a folder whole or not at all: under a temporary name first, then renamed in one step.

Several processes may write to one place.  Temporary names are unique, each temporary file or folder is locked while its
process lives, and the next write to the same target removes what killed processes left behind.
"""

import ctypes
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from revq.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: the writes work, without locks between processes
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it becomes ``path`` if the block succeeds, else it is removed.

    A process killed inside the block leaves ``path`` unchanged.  The block must write into the existing temporary file
    instead of renaming another one over it.  A symbolic link is followed: its target is replaced, the link stays.

    Raises:
        InputError: see `check_writable_file`.
    """
    path = check_writable_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary, descriptor = _create_temporary(path, folder=False)
    try:
        yield temporary
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.fsync(descriptor)
        os.replace(temporary, path)  # noqa: PTH105 - named like the system call that makes this atomic
    finally:
        with suppress(FileNotFoundError):  # after the rename, there is none
            temporary.unlink()
        os.close(descriptor)
    _flush_folder(path.parent)


@contextmanager
def atomic_folder(target: str | Path, ours: frozenset[str], *, keep_others: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``target``; it becomes ``target`` if the block succeeds and is removed if it fails.

    Args:
        target: may exist.  Its files that are named in ``ours`` are replaced, or removed if the block does not write them.
            A symbolic link is followed.
        ours: names of files that a folder of this kind holds.
        keep_others: whether all other files of ``target`` stay (True) or are refused (False), see `check_writable_folder`.

    Raises:
        InputError: see `check_writable_folder`.
    """
    target = check_writable_folder(target, ours, keep_others=keep_others)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    new, descriptor = _create_temporary(target, folder=True)
    try:
        yield new
        if target.exists():
            check_writable_folder(target, ours, keep_others=keep_others)
            carry_over(target, new, ours.__contains__)
        for path in [*new.rglob("*"), new]:
            if path.is_dir():
                _flush_folder(path)
            elif path.is_file() and not path.is_symlink():  # opening a pipe would wait for its other end
                _flush_file(path)
        try:
            new.rename(target)  # replaces an empty folder, too
        except OSError:
            if not target.is_dir():
                raise
            exchange_folders(new, target)
        _flush_folder(target.parent)
    finally:
        os.close(descriptor)
        shutil.rmtree(new, ignore_errors=True)  # after an exchange, this is the old folder


@contextmanager
def temporary_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``, on its file system, which is removed at the end of the block."""
    target = check_writable_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    folder, descriptor = _create_temporary(target, folder=True)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def check_writable_file(path: str | Path) -> Path:
    """The file that writing to ``path`` creates or replaces: ``path`` with symbolic links resolved.

    Raises:
        InputError: if that is a folder, a device, a pipe or a socket, lies below a file, or has an impossible name.
    """
    real = _real(path)
    kind = _kind(real)
    if kind not in (None, "a file"):
        raise InputError(f"{path}: expected a file to write, found {kind}")
    _check_parents(path, real)
    return real


def check_writable_folder(path: str | Path, ours: frozenset[str], *, keep_others: bool = False) -> Path:
    """The folder that writing to ``path`` creates or replaces: ``path`` with symbolic links resolved.

    Args:
        path: folder to write to.
        ours: names of files that may be replaced.
        keep_others: accept any other files, which the caller keeps.  Without it, only files that desktop systems leave
            everywhere, such as .DS_Store, are accepted beside ``ours``.

    Raises:
        InputError: if that is not a folder, lies below a file, has an impossible name, or holds files that are not
            accepted.
    """
    real = _real(path)
    kind = _kind(real)
    if kind not in (None, "a folder"):
        raise InputError(f"{path}: expected a folder to write to, found {kind}")
    _check_parents(path, real)
    if kind and not keep_others:
        with os.scandir(real) as entries:
            foreign = sorted(entry.name for entry in entries if not _replaceable(entry, ours))
        if foreign:
            older = ", or an older one of the same kind" if ours else ""
            raise InputError(f"{path}: expected a new or empty folder{older}, but it holds {foreign[0]}")
    if kind and keep_others:
        for name in ours:
            if (real / name).is_dir():
                raise InputError(f"{path}: expected a folder to write to, but its {name} is a folder")
    return real


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold the right to write to ``folder``, which need not exist, for the length of the block.

    The lock is a file beside the folder, which vanishes with the lock; a killed process loses its lock at once.

    Raises:
        InputError: if another process holds it.
    """
    folder = _real(folder)
    if fcntl is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".revq-{_digest(folder)}.lock")
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        if not _lock(descriptor):
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise InputError(f"{folder}: another process{owner and f' ({owner})'} is writing to it")
        try:  # the former owner may have removed the file between the two calls above
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def exchange_folders(new: Path, target: Path) -> None:
    """Swap the names of two folders on one file system.

    A rename cannot replace a folder that holds files, so replacing needs either two renames, between which no ``target``
    exists, or the swap that Linux offers as one system call.  The second is used where it works.
    """
    if not _exchange_in_one_step(new, target):
        aside = new.with_name(new.name + ".old")
        target.rename(aside)
        new.rename(target)  # a process killed before this line leaves the old folder under the name `aside`
        aside.rename(new)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give the file ``source`` the second name ``target``; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def carry_over(target: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Give the other files of ``target`` a second name in ``new``, so that no moment exists at which they are missing."""
    for path in target.iterdir():
        if is_ours(path.name) or (new / path.name).exists():
            continue
        if path.is_symlink():
            (new / path.name).symlink_to(path.readlink())
        elif path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link_or_copy)
        elif path.is_file():
            link_or_copy(path, new / path.name)
        else:  # a pipe or a socket
            os.link(path, new / path.name)


def _replaceable(entry: "os.DirEntry[str]", ours: frozenset[str]) -> bool:
    left_everywhere = entry.name in (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")
    return (entry.name in ours or left_everywhere) and entry.is_file()


def _real(path: str | Path) -> Path:
    text = os.fspath(path)
    if "\0" in text or not text:
        raise InputError(f"{text!r}: expected the name of a file or folder")
    return Path(os.path.realpath(Path(text).expanduser()))


def _kind(path: Path) -> str | None:
    """What is at ``path``, in words; None if nothing is."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    names = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link that leads back to itself",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode), "something else")


def _check_parents(path: str | Path, real: Path) -> None:
    for parent in real.parents:
        kind = _kind(parent)
        if kind == "a folder":
            return
        if kind is not None:
            raise InputError(f"{path}: expected {parent} to be a folder, found {kind}")


def _create_temporary(target: Path, *, folder: bool) -> tuple[Path, int]:
    """Create a locked temporary file or folder beside ``target``; returns its path and an open descriptor.

    Its name holds a digest of the target's name, which may be as long as a name can be.
    """
    while True:
        path = target.with_name(f".revq-{_digest(target)}-{secrets.token_hex(6)}.tmp")
        if folder:
            path.mkdir()
            descriptor = os.open(path, os.O_RDONLY)
        else:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)  # the user's umask applies
        if _lock(descriptor) and path.exists():
            return path, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked, and removes it


def _digest(target: Path) -> str:
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders of killed writers of ``target``: those that no living process has locked."""
    for path in target.parent.glob(f".revq-{_digest(target)}-*.tmp"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # finished or removed in between, or another user's
            continue
        try:
            if _lock(descriptor):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process; False if another process has it.

    True where the system or the file system has no locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network file system without locks
            return True
    return True


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


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """Have the system write a folder's list of names to the disk."""
    with suppress(PermissionError):  # a folder that may be written to but not listed
        _flush_file(path)
