"""Hostile files and names: each has to end in one line and exit code 2, or in the right result, within bounds.

Usage: ``python -m tests.fuzz.hostile [--seed 0]``

Every case runs the command line in a child that was forked from a warm process, whose memory beyond that of the imports and
whose time are measured.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from revq import cli
from tests.fuzz import kills

MOST_SECONDS = 5.0
MOST_BYTES = 1 << 30


class Case(NamedTuple):
    """One command line."""

    name: str
    arguments: list[str]
    prepare: Callable[[], object] = tuple
    """Makes its files."""


class Outcome(NamedTuple):
    """How a case ended."""

    name: str
    code: int
    lines: int
    """Lines of errors; progress bars are left out."""
    seconds: float
    extra_bytes: int
    error: str

    @property
    def is_wrong(self) -> bool:
        """Whether it ended in a traceback or out of bounds."""
        bounded = self.seconds <= MOST_SECONDS and self.extra_bytes <= MOST_BYTES
        return not (bounded and (self.code == 0 or (self.code == 2 and self.lines == 1)))


def pictures(folder: Path, rng: random.Random) -> Iterator[Path]:
    """Image files that are damaged, enormous, thin or odd."""
    from PIL import Image

    def save(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "ICO"):
        whole = encoded(noise, kind)
        for number in range(6):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 4, 40))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield save(
                f"noise-{number}.{kind.lower()}", bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
            )
    for width, height in ((1, 30_000), (30_000, 1), (1 << 26, 1), (1, 1 << 26), (13_300, 13_300), (1 << 31, 1 << 31)):
        header = struct.pack(">IIBBBBB", width & 0x7FFFFFFF or 1, height & 0x7FFFFFFF or 1, 1, 0, 0, 0, 0)
        rows = zlib.compress(bytes(min(1 << 24, (width // 8 + 1) * height)))
        chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        yield save(f"size-{width}x{height}.png", b"\x89PNG\r\n\x1a\n" + body)
    for number in range(20):
        exif = b"Exif\0\0" + rng.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"xx")) + rng.randbytes(60)
        yield save(f"exif-{number}.jpg", encoded(noise, "JPEG", exif=exif))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"):
        yield save(f"mode-{mode.replace(';', '_')}.tif", encoded(Image.new(mode, (40, 40)), "TIFF"))
    for name, data in (
        ("empty.png", b""),
        ("text.jpg", b"no image"),
        ("a" * 200 + ".png", encoded(noise, "PNG")),
        ("new\nline.png", encoded(noise, "PNG")),
        ("ä 日本 \U0001f600.png", encoded(noise, "PNG")),
    ):
        yield save(name, data)


def texts() -> dict[str, bytes]:
    """JSON texts that are none, or that hold what nobody expects."""
    numbers = (
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "1" * 5000,
        "-1",
        "0",
        "1.5",
        "true",
        "null",
        '"x"',
        "[]",
        "10000000000000",
    )
    return {
        "nothing": b"",
        "no UTF-8": b'{"a": "\xff"}',
        "deep list": b"[" * 200_000,
        "deep object": b'{"a":' * 100_000,
        "a list": b"[1, 2]",
        "NUL": b'{"a": 1}\0',
        "twice": b'{"format": 1, "format": 2}',
        **{f"number {text[:8]}": text.encode() for text in numbers},
    }


def documents(made: Path, folder: Path) -> Iterator[Case]:
    """Our JSON files with every hostile text as the whole and as each value."""
    places = {
        "store/index.json": lambda at: ["info", str(at / "store")],
        "run/model/config.json": lambda at: ["info", str(at / "run" / "model")],
        "run/model/tokenizer.json": lambda at: ["info", str(at / "run" / "model")],
        "run/metrics.jsonl": lambda at: ["train", "--latents", str(at / "store"), "--out", str(at / "run"), *_TRAIN],
        "vae/config.json": lambda at: ["info", str(at / "vae")],
    }
    for name, arguments in places.items():
        whole = (made / name).read_bytes()
        first = json.loads(whole.splitlines()[0] if name.endswith("l") else whole)
        variants = dict(texts())
        for key in first:
            for label in ("number 1e999", "number 10000000", "number -1", "number 1.5", "number []", "number true"):
                variants[f"{key} = {label}"] = _with_value(first, key, texts()[label])
        for number, (label, text) in enumerate(variants.items()):
            at = folder / f"{name.replace('/', '-')}-{number}"

            def prepare(at: Path = at, changed: Path = at / name, text: bytes = text) -> None:
                shutil.copytree(made, at, ignore=shutil.ignore_patterns("photos", "work"))
                changed.write_bytes(text + b"\n")

            yield Case(f"{name}: {label}", arguments(at), prepare)


def cases(made: Path, folder: Path, rng: random.Random) -> Iterator[Case]:
    """All hostile cases."""
    (folder / "pictures").mkdir()
    paths = list(pictures(folder / "pictures", rng))
    size = ["--image-size", "32", "--vae", str(made / "vae")]
    for path in paths:
        yield Case(
            f"picture {path.name[:40]!r}", ["encode", "--images", str(path), "--out", str(folder / "out"), *size]
        )
    yield Case("all pictures", ["encode", "--images", str(folder / "pictures"), "--out", str(folder / "all"), *size])
    yield from documents(made, folder)
    for name in (
        "tokens",
        "run/checkpoint.pt",
        "run/model/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        for number in range(6):
            at = folder / f"damaged-{name.replace('/', '-')}-{number}"
            shutil.copytree(made, at, ignore=shutil.ignore_patterns("photos", "work"))
            data = bytearray((at / name).read_bytes())
            for _ in range(20):
                data[rng.randrange(min(len(data), 400) if number % 2 else len(data))] = rng.randrange(256)
            (at / name).write_bytes(data[: len(data) if number < 3 else rng.randrange(len(data))])
            target = {"tokens": at / "tokens", "run/checkpoint.pt": at / "run"}.get(name, (at / name).parent)
            yield Case(f"{name}, damage {number}", ["info", str(target)])
    for options in (
        ["--model.num-codes", str(10**11)],
        ["--model.rectifier.layers", str(10**9)],
        ["--model.rectifier.width", str(10**9)],
        ["--train.batch-size", str(10**12)],
        ["--train.epochs", "-3"],
        *(["--train.learning-rate", text] for text in ("1e39", "3e38", "inf", "nan", "-1", "0")),
        *(
            [f"--train.{name}", text]
            for name in ("clip-norm", "reset-noise", "lr-floor")
            for text in ("nan", "inf", "1e39")
        ),
    ):
        yield Case(
            f"train {options}", ["train", "--latents", str(made / "store"), "--out", str(folder / "new"), *options]
        )


_TRAIN = ["--model.num-tokens", "16", "--model.num-codes", "8", "--train.epochs", "1"]


def run(case: Case) -> Outcome:
    """Run a case in a child."""
    case.prepare()
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        errors = io.StringIO()
        try:
            with redirect_stderr(errors), redirect_stdout(io.StringIO()):
                code = cli.main(case.arguments)
        except SystemExit as stop:
            code = 2 if stop.code == 2 else 70
            errors = io.StringIO("usage")
        except BaseException as error:
            code = 70
            errors.write(f"{type(error).__name__}: {error}")
        lines = [
            line for line in errors.getvalue().replace("\r", "\n").splitlines() if line.strip() and "%|" not in line
        ]
        extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        os.write(write, json.dumps([code, len(lines), extra, " | ".join(lines)[-300:]]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - start
    code, lines, extra, error = json.loads(answer) if answer else (status or 70, 0, 0, "died without an answer")
    return Outcome(case.name, code, lines, seconds, extra, error)


def _with_value(values: dict[str, object], key: str, text: bytes) -> bytes:
    marker = "\x01value\x01"
    return json.dumps({**values, key: marker}).encode().replace(json.dumps(marker).encode(), text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; returns 1 if one ends in a traceback or out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, help="run so many cases, spread over all; all of them by default")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        made, folder = Path(name) / "made", Path(name) / "cases"
        made.mkdir()
        folder.mkdir()
        kills.verbs(made)
        warm: Callable[[], object] = lambda: cli.main(["info", str(made / "run")])  # noqa: E731
        with redirect_stdout(io.StringIO()):
            warm()
        for number, case in enumerate(cases(made, folder, random.Random(options.seed))):
            if options.most and (number % 9 or len(outcomes) == options.most):
                continue
            outcome = run(case)
            outcomes.append(outcome)
            if options.verbose or outcome.is_wrong:
                print(outcome, flush=True)
            for path in folder.iterdir():
                if path.name in ("out", "new", "all") or path.name.startswith(("damaged", "store-", "run-", "vae-")):
                    shutil.rmtree(path, ignore_errors=True)
    wrong = sum(outcome.is_wrong for outcome in outcomes)
    slowest, largest = max(o.seconds for o in outcomes), max(o.extra_bytes for o in outcomes)
    print(f"{len(outcomes)} cases, {wrong} wrong; the slowest took {slowest:.1f} s, the largest {largest >> 20} MiB")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
