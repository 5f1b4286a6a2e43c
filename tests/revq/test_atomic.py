"""Atomic writes: whole or not at all, whatever is in the way and whoever else writes."""

import os
import socket
import subprocess
import sys
import time

import pytest

from revq.data.atomic import atomic_file, atomic_folder, check_writable_file, folder_lock
from revq.errors import InputError


def test_a_file_is_replaced_or_left(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.parent == path.parent
    path.chmod(0o640)
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and [*path.parent.iterdir()] == [path]
    with atomic_file(path) as temporary:
        temporary.write_text("three")
    assert path.read_text() == "three" and path.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_stays(tmp_path):
    target = tmp_path / "deep" / "target"
    target.parent.mkdir()
    for link, to in (
        ("absolute", target),
        ("relative", "deep/target"),
        ("chain", "absolute"),
        ("dangling", "deep/new"),
    ):
        (tmp_path / link).symlink_to(to)
        with atomic_file(tmp_path / link) as temporary:
            temporary.write_text(link)
        assert (tmp_path / link).is_symlink() and (tmp_path / link).resolve().read_text() == link
    (tmp_path / "folder").symlink_to(tmp_path / "deep")
    with atomic_folder(tmp_path / "folder", frozenset({"a"}), keep_others=True) as new:
        (new / "a").write_text("a")
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "deep" / "a").read_text() == "a"
    assert target.read_text() == "chain"


@pytest.mark.parametrize("write", [atomic_file, lambda path: atomic_folder(path, frozenset(), keep_others=True)])
def test_other_kinds_of_files_are_refused(tmp_path, write, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to_pipe").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        opened.bind("socket")
    (tmp_path / "file").write_text("mine")
    wrong = ["/dev/null", "", "\0", "pipe", "loop", "to_pipe", "socket", "file/x"]
    for path in wrong:
        with pytest.raises(InputError, match="expected"), write(path):
            pass
    with pytest.raises(InputError, match="found a folder"):
        check_writable_file(tmp_path)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "socket").is_socket()


def test_other_files_of_a_folder(tmp_path):
    folder, ours = tmp_path / "f", frozenset({"a", "b"})
    folder.mkdir()
    for name in ("a", "b", "README.md"):
        (folder / name).write_text(name)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("mine")
    (folder / "link").symlink_to("README.md")
    os.mkfifo(folder / "pipe")
    inode = (folder / "README.md").stat().st_ino
    with pytest.raises(InputError, match=r"holds \.git"), atomic_folder(folder, ours):
        pass
    for failure in (True, False):
        try:
            with atomic_folder(folder, ours, keep_others=True) as new:
                (new / "a").write_text("new")
                if failure:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert (folder / "b").read_text() == "b"
    assert (folder / "a").read_text() == "new" and not (folder / "b").exists()
    assert (folder / "README.md").stat().st_ino == inode and (folder / ".git" / "config").read_text() == "mine"
    assert (folder / "link").is_symlink() and (folder / "pipe").is_fifo()
    assert [*tmp_path.iterdir()] == [folder]
    (tmp_path / "desktop").mkdir()
    (tmp_path / "desktop" / ".DS_Store").write_text("")
    with atomic_folder(tmp_path / "desktop", ours) as new:
        (new / "a").write_text("new")
    assert (tmp_path / "desktop" / "a").read_text() == "new"


CHILD = """
import sys, time
from pathlib import Path
from revq.data.atomic import atomic_file, atomic_folder, folder_lock
with atomic_file(sys.argv[1] + "/file") as a, atomic_folder(sys.argv[1] + "/folder", frozenset()) as b:
    with folder_lock(sys.argv[1] + "/folder"):
        a.write_text("half"), (b / "x").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""


def test_leftovers_of_killed_processes(tmp_path):
    """They go with the next write to the same target; those of a living process stay, and so does its lock."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        living = {path for path in tmp_path.iterdir() if path.suffix == ".tmp"}
        assert len(living) == 2
        with pytest.raises(InputError, match=f"another process \\({child.pid}\\)"), folder_lock(tmp_path / "folder"):
            pass
        for _ in range(2):
            with atomic_file(tmp_path / "file") as temporary:
                temporary.write_text("mine")
            with atomic_folder(tmp_path / "folder", frozenset()):
                pass
            assert living <= set(tmp_path.iterdir())
    finally:
        child.kill()
        child.wait()
    with folder_lock(tmp_path / "folder"), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("mine")
    with atomic_folder(tmp_path / "folder", frozenset()):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


WRITER = """
import sys
from revq.data.atomic import atomic_file
for number in range(25):
    with atomic_file(sys.argv[1]) as path:
        path.write_text(f"{sys.argv[2]} {number} " * 5000)
"""


def test_two_writers_and_a_reader(tmp_path):
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            words = path.read_text().split()
            assert len(words) == 10_000 and len(set(words)) == 2, "a broken file was visible"
            seen += 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0] and seen
    assert [*tmp_path.iterdir()] == [path]


def test_long_names(tmp_path):
    path = tmp_path / ("x" * 255)
    with atomic_file(path) as temporary:
        temporary.write_text("x")
    with folder_lock(path), pytest.raises(OSError, match="too long"), atomic_file(tmp_path / ("x" * 256)):
        pass
    assert [*tmp_path.iterdir()] == [path]
