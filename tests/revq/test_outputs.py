"""What the command line leaves on disk: outputs that exist, links, full disks, interruptions, pages, names."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli_case import SMALL, revq_main, subprocess_revq, tree
from PIL import Image
from tiny_vae import IMAGE_SIZE, save_photos

import revq
import revq.cli
import revq.data.latents
import revq.data.vae
import revq.model.revq
import revq.tokenizer
from revq.data.images import center_crop, load_image, to_tensor
from revq.data.tokens import load_tokens
from revq.eval.evaluate import image_quality, reconstruct
from revq.tokenizer import image_names
from revq.train.state import load_checkpoint


def test_a_terminated_training_says_what_is_saved(made, tmp_path):
    """In a process of its own; the next test sends the other signals to this one."""
    out = tmp_path / "run"
    process = subprocess_revq("train", "--latents", made / "latents", "--out", out, *SMALL[:-1], 100000)
    while process.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    message = f"revq: interrupted; step {step} is saved in {out}/checkpoint.pt, the same command goes on from there\n"
    assert errors.endswith(message), errors
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def interrupt_at(monkeypatch, owner, name, call=1, number=signal.SIGINT, after=False):
    """Send this process a signal before, or after, call number ``call`` of ``owner.name``."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and not after:
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if len(calls) == call and after:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, wrapper)


def test_what_an_interruption_says_is_true(made, tmp_path, monkeypatch, capsys):
    """For each verb: before the work, in the middle of it, and after its output is in place."""
    model = ["--model", made / "run", "--images", made / "photos"]
    tokenize, reconstruct = ["tokenize", *model, "--batch-size", 2], ["reconstruct", *model]
    detokenize = ["detokenize", "--model", made / "run", "--tokens", made / "tokens", "--batch-size", 2]
    encode = ["encode", "--images", made / "photos", "--image-size", IMAGE_SIZE, "--vae", made / "vae"]
    train = ["train", "--latents", made / "latents", *SMALL]
    vae, writer = revq.FrozenVAE, "written: {out}"
    for verb, owner, name, call, after, message in (
        (tokenize, vae, "encode", 2, False, "nothing was written"),
        (tokenize, revq.data.images, "summarize", 1, False, writer),
        (reconstruct, vae, "decode", 2, False, "nothing was written"),
        (reconstruct, revq.data.images, "summarize", 1, False, writer),
        (detokenize, vae, "decode", 2, False, "nothing was written"),
        (detokenize, revq.tokenizer, "detokenize_file", 1, True, writer),
        (encode, vae, "encode", 1, False, "the same command keeps the finished shards, if any, and makes the others"),
        (train, revq.data.latents.LatentStore, "__len__", 1, False, "this call saved nothing"),
        (train, revq.model.revq.ReVQ, "forward", 1, False, "step 1 is saved in {out}/checkpoint.pt, the same command"),
        (["demo"], revq.data.vae, "vae_folder", 1, False, "the next demo starts from the beginning"),
    ):
        for number in (signal.SIGINT, signal.SIGTERM):
            out = tmp_path / ("out.png" if verb is reconstruct else "out")
            with monkeypatch.context() as patch:
                interrupt_at(patch, owner, name, call, number, after)
                assert revq_main(*verb, "--out", out) == 128 + number, (verb[0], name)
            error = capsys.readouterr().err
            assert error.rstrip().rpartition("\n")[2].startswith(f"revq: interrupted; {message.format(out=out)}"), error
            assert out.exists() == (message == writer or name in ("forward", "vae_folder")), (verb[0], name)
            for left in tmp_path.iterdir():
                assert not left.name.startswith(".revq"), left
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def test_overwrite(made, tmp_path, capsys):
    """What exists is refused, or replaced by what a new name would hold; other files in a folder stay."""
    model = ["--model", made / "run", "--images", made / "photos"]
    other = save_photos(tmp_path / "other", 2, seed=5)
    verbs = {
        "tokens": ["tokenize", *model],
        "pages.png": ["reconstruct", *model],
        "pictures": ["detokenize", "--model", made / "run", "--tokens", made / "tokens"],
        "latents": ["encode", "--images", made / "photos", "--image-size", IMAGE_SIZE, "--vae", made / "vae"],
        "run": ["train", "--latents", made / "latents", *SMALL, "--train.epochs", 1],
    }
    (tmp_path / "fresh").mkdir()
    (tmp_path / "again").mkdir()
    for name, verb in verbs.items():
        assert revq_main(*verb, "--out", tmp_path / "fresh" / name) == 0
    for name, verb in (
        ("tokens", ["tokenize", "--model", made / "run", "--images", other[0]]),
        ("pages.png", ["reconstruct", "--model", made / "run", "--images", *other]),
        ("latents", [*verbs["latents"], "--crops", 2]),
        ("run", [*verbs["run"], "--train.seed", 5]),
    ):
        assert revq_main(*verb, "--out", tmp_path / "again" / name) == 0
    (tmp_path / "again" / "pictures" / "sub").mkdir(parents=True)
    for name in ("mine.txt", "photo-01.png", "sub/photo-00.png", "sub/mine.txt"):
        (tmp_path / "again" / "pictures" / name).write_text("mine")
    before = tree(tmp_path / "again")
    for name, verb in verbs.items():
        capsys.readouterr()
        assert revq_main(*verb, "--out", tmp_path / "again" / name) == 2, name
        assert "revq: error: " in capsys.readouterr().err
        assert tree(tmp_path / "again") == before, name
    for name, verb in verbs.items():
        assert revq_main(*verb, "--out", tmp_path / "again" / name, "--overwrite") == 0, name
    expected, got = tree(tmp_path / "fresh"), tree(tmp_path / "again")
    assert got.pop("pictures/mine.txt") == got.pop("pictures/sub/mine.txt") == b"mine"
    for timed in ("run/metrics.jsonl", "run/checkpoint.pt"):
        assert got.pop(timed) and expected.pop(timed)
    assert got == expected


def test_links_are_written_through(made, tmp_path):
    """A symbolic link to a file or a folder stays, and what it names is written."""
    model = ["--model", made / "run", "--images", made / "photos"]
    for name, verb in (
        ("tokens", ["tokenize", *model]),
        ("p.png", ["reconstruct", *model]),
        ("pictures", ["detokenize", "--model", made / "run", "--tokens", made / "tokens"]),
        ("run", ["train", "--latents", made / "latents", *SMALL, "--train.epochs", 1]),
        ("latents", ["encode", "--images", made / "photos", "--image-size", IMAGE_SIZE, "--vae", made / "vae"]),
    ):
        (tmp_path / "far").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
        assert revq_main(*verb, "--out", tmp_path / name) == 0
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / name).exists(), name


def test_pages(made, tmp_path, capsys):
    """Twenty images, one of them damaged: two pages, the means over all that could be read."""
    photos = save_photos(tmp_path / "photos", 20, seed=2)
    photos[3].write_bytes(photos[3].read_bytes()[:100])
    out = tmp_path / "page.png"
    assert revq_main("reconstruct", "--model", made / "run", "--images", tmp_path / "photos", "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 19 images, 1 skipped (1 " in printed and "on 2 pages, up to page-2.png" in printed
    heights = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as page:
            heights[path.name] = page.height
    assert heights == {"page.png": 22 + 16 * (IMAGE_SIZE + 20), "page-2.png": 22 + 3 * (IMAGE_SIZE + 20)}
    tokenizer = revq.Tokenizer.from_pretrained(made / "run")
    images = to_tensor([center_crop(load_image(path), IMAGE_SIZE) for path in photos if path != photos[3]])
    for value in image_quality(reconstruct(tokenizer.model, tokenizer.vae, images)).values():
        assert f"{value.psnr:.2f}" in printed and f"{value.ssim:.4f}" in printed


def test_a_run_is_named_by_its_folder(made, tmp_path, capsys):
    """``--model runs/mine`` is ``runs/mine/model``; a run that is itself called model holds its model."""
    for name in (made / "run", made / "run" / "model"):
        assert (
            revq_main("tokenize", "--model", name, "--images", made / "photos", "--out", tmp_path / "t", "--overwrite")
            == 0
        )
        assert load_tokens(tmp_path / "t").indices.tolist() == load_tokens(made / "tokens").indices.tolist()
    run = tmp_path / "runs" / "model"
    assert revq_main("train", "--latents", made / "latents", "--out", run, *SMALL) == 0
    assert not (run / "model").exists() and (run / "model.safetensors").is_file()
    assert (
        revq_main("tokenize", "--model", run, "--images", made / "photos", "--out", tmp_path / "t", "--overwrite") == 0
    )
    capsys.readouterr()
    assert revq_main("info", run) == 0
    printed = capsys.readouterr().out
    assert "after 2 of 2 epochs" in printed and "T = 16" in printed
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "checkpoint.pt", unfinished)
    assert revq_main("tokenize", "--model", unfinished, "--images", made / "photos", "--out", tmp_path / "u") == 2
    assert "a run whose training is not finished" in capsys.readouterr().err


def test_crops_become_pictures_with_one_suffix(made, tmp_path):
    tokenize = ["tokenize", "--model", made / "run", "--images", made / "latents", "--out", tmp_path / "crops"]
    assert revq_main(*tokenize) == 0
    detokenize = ["detokenize", "--model", made / "run", "--tokens", tmp_path / "crops", "--out", tmp_path / "d"]
    assert revq_main(*detokenize) == 0
    names = {path.relative_to(tmp_path / "d").as_posix() for path in (tmp_path / "d").rglob("*.png")}
    assert len(names) == 36 and {"photo-02-0.png", "sub/photo-00-3.png"} < names


def test_a_full_disk_is_one_line(made, tmp_path, capsys):
    """Every file of more than 500 bytes fails in the middle of a write, as on a full disk."""
    model, images = ["--model", made / "run"], ["--images", made / "photos"]
    vae = ["--image-size", IMAGE_SIZE, "--vae", made / "vae"]
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        codes = [
            revq_main("encode", *images, *vae, "--out", tmp_path / "a"),
            revq_main("train", "--latents", made / "latents", "--out", tmp_path / "b", *SMALL),
            revq_main("tokenize", *model, *images, "--out", tmp_path / "c"),
            revq_main("reconstruct", *model, *images, "--out", tmp_path / "d.png"),
            revq_main("detokenize", *model, "--tokens", made / "tokens", "--out", tmp_path / "e"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert codes == [2] * 5
    assert capsys.readouterr().err.count("revq: error: ") == 5
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"a.partial/index.json", "b/metrics.jsonl"}, (
        left
    )  # of an unfinished store without a shard, and a log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_standard_output_is_one_line(made):
    code = "import sys; from revq.cli import main; sys.stdout = open('/dev/full', 'w'); sys.exit(main())"
    process = subprocess_revq("--version", code=code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1 and "No space left" in errors, errors


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "sub/b.PNG", "c"], ["a.png", "sub/b.png", "c.png"]),
        (["a.png.0", "a.png.11", "b.tiff.2"], ["a-0.png", "a-11.png", "b-2.png"]),
        (["v1.5", "v1.6", "archive.tar.jpg"], ["v1.5.png", "v1.6.png", "archive.tar.png"]),
        (["a.jpg", "a.png"], ["a-jpg.png", "a-png.png"]),
        (["a.jpg", "a.png/x.jpg"], ["a-jpg.png", "a.png/x-jpg.png"]),
        (["a.jpg.1", "a-1.jpg"], ["a-jpg-1.png", "a-1-jpg.png"]),
        (["a.jpg", "A.jpg"], ["000000.png", "000001.png"]),
        (["a\0.jpg", "b.jpg"], ["000000.png", "000001.png"]),
        (["n" * 254, "b.jpg"], ["000000.png", "000001.png"]),
    ],
    ids=lambda names: ascii(names)[:30],
)
def test_names_of_pictures(names, expected):
    """One suffix, all different, none a folder of another; what cannot be a name becomes a number."""
    assert image_names(names, "tokens") == expected
