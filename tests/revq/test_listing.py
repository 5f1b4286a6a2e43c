"""Which files of a folder are images: what is skipped, with its reason; links, and names that cannot be stored."""

import os
import socket

import pytest

from revq.data.images import SkippedFile, image_files, list_images, summarize
from revq.errors import InputError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder):
    listing = image_files([folder])
    return [file.name for file in listing.files], dict(listing.skipped)


def test_hidden_and_system_folders_are_not_data(tmp_path):
    hidden = [
        ".ipynb_checkpoints/a.png",
        ".thumbnails/a.png",
        "@eaDir/a.jpg/S.jpg",
        "__MACOSX/a.png",
        "b/lost+found/a.png",
    ]
    hidden += [
        "$RECYCLE.BIN/a.png",
        "System Volume Information/a.png",
        "#recycle/a.png",
        ".a.jpg",
        "b/._a.jpg",
        "Thumbs.db",
    ]
    touch(tmp_path, "a.png", "b/b.png", *hidden)
    names, skipped = listed(tmp_path)
    assert names == ["a.png", "b/b.png"]
    assert len(skipped) == len(hidden)
    assert set(skipped.values()) == {"hidden"}
    touch(tmp_path, ".photos/c.png")
    assert listed(tmp_path / ".photos") == (["c.png"], {})  # a folder that is given is read


def test_suffixes_are_those_that_pillow_decodes(tmp_path):
    images = ["a.JPG", "b.jfif", "c.ppm", "d.pgm", "e.jp2", "f.tif", "g.apng", "h.bmp", "i.tga", "j.qoi", "k.mpo"]
    touch(tmp_path, *images, "l.txt", "m", "n.eps", "o.pdf", "p.h5", "q.mpg", "r.svg")
    names, skipped = listed(tmp_path)
    assert names == images
    unread = {"n.eps": ".eps", "o.pdf": ".pdf", "p.h5": ".h5", "q.mpg": ".mpg"}
    assert skipped == {
        "l.txt": "not an image: .txt",
        "m": "not an image: no suffix",
        "r.svg": "not an image: .svg",
    } | {name: f"format that is not read: {suffix}" for name, suffix in unread.items()}


def test_linked_folders_are_read_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root, "z/a.png")
    touch(outside, "b.png", "in/c.png")
    for link, target in {"first": outside, "second": outside, "self": root, "above": tmp_path, "a": root / "z"}.items():
        (root / link).symlink_to(target)
    (outside / "in" / "cycle").symlink_to(outside)
    (root / "file.png").symlink_to(outside / "b.png")
    names, skipped = listed(root)
    assert names == ["file.png", "first/b.png", "first/in/c.png", "z/a.png"]
    again = "link to a folder that is read already"
    assert skipped == {
        "a/": again,
        "above/": "link to a folder above",
        "first/in/cycle/": again,
        "second/": again,
        "self/": again,
    }


def test_what_is_no_readable_file_is_skipped(tmp_path):
    touch(tmp_path, "a.png", "folder.png/b.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))  # a path of at most 100 bytes
        names, skipped = listed(tmp_path)
    assert names == ["a.png", "folder.png/b.png"]
    assert skipped == {
        "broken.png": "broken link",
        "fifo.png": "not a regular file",
        "loop.png": "broken link",
        "socket.png": "not a regular file",
    }


def test_a_folder_without_permission_is_skipped(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    scan = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):  # the tests may run as root, who may read everything
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert listed(tmp_path) == (["a.png"], {"locked/": "folder that cannot be read: Permission denied"})


def test_names_that_cannot_be_stored_are_skipped(tmp_path):
    touch(tmp_path, "\u00e9\U0001f600.png", "a\nb.png", os.fsdecode(b"c\xff.png"), os.fsdecode(b"d\xfe/e.png"))
    names, skipped = listed(tmp_path)
    assert names == ["\u00e9\U0001f600.png"]
    assert skipped == {
        r"a\nb.png": "name with a control character",
        r"c\udcff.png": "name that is not UTF-8",
        r"d\udcfe/": "name that is not UTF-8",
    }
    with pytest.raises(InputError, match="got none, 1 skipped"):
        image_files([tmp_path / "a\nb.png"])


def test_the_summary_counts_reasons():
    skipped = [SkippedFile(".a", "hidden"), SkippedFile("b", "not an image: .txt"), SkippedFile(".c", "hidden")]
    assert summarize(7, skipped) == "7 images, 3 skipped (2 hidden, 1 not an image: .txt)"
    assert summarize(1, []) == "1 image"
    many = summarize(0, [SkippedFile(str(n), f"not an image: .{n}") for n in range(9)])
    assert many.endswith("1 not an image: .5, 3 for other reasons)")


def test_images_are_listed_sorted_with_subfolders_and_without_others(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.PNG", "a.jpeg", "b/c.webp", "b/a.jpg", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpeg", "b/a.jpg", "b/c.webp", "z.PNG"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"at least one image, found none$"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="found nothing"):
        list_images(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="found a file"):
        list_images(tmp_path / "file")
