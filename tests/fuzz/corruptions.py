"""Corrupts our own files at random: a reader has to refuse them in one line or return what was written.

Usage: ``python -m tests.fuzz.corruptions [--count 600] [--seed 0]``

A corruption is *silent* if every value is read without an error and one of them differs.  config.json and metrics.jsonl are
exempt from that, since people edit the first and the second is a log, but not from the rule against tracebacks.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from revq.data.latents import LatentStore
from revq.data.tokens import load_tokens
from revq.errors import InputError
from revq.model.revq import ReVQ, read_origin
from revq.train import read_records
from revq.train.state import load_checkpoint
from tests.fuzz import kills

EXEMPT = ("config.json", "metrics.jsonl")


class Outcome(NamedTuple):
    """What a corruption of one file led to."""

    file: str
    change: str
    verdict: str
    """refused, same, silent, exempt or traceback."""
    detail: str = ""


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit changes."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    """A range becomes zero, as after a crash of the system."""
    start, stop = _range(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def noise(data: bytes, rng: random.Random) -> bytes:
    """A range becomes random."""
    start, stop = _range(data, rng)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data))]


def grow(data: bytes, rng: random.Random) -> bytes:
    """Something is appended."""
    return data + rng.randbytes(rng.randint(1, 100))


def remove(data: bytes, rng: random.Random) -> bytes:
    """A range is missing."""
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A range occurs twice."""
    start, stop = _range(data, rng)
    return data[:stop] + data[start:]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two ranges of one length change places."""
    length = rng.randint(1, max(1, len(data) // 4))
    first = rng.randint(0, max(0, len(data) // 2 - length))
    second = rng.randint(len(data) // 2, max(len(data) // 2, len(data) - length))
    a, b = data[first : first + length], data[second : second + length]
    return data[:first] + b + data[first + length : second] + a + data[second + length :]


def digit(data: bytes, rng: random.Random) -> bytes:
    """A decimal digit becomes another, as a slip of the keyboard."""
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return flip(data, rng)
    place = rng.choice(places)
    return data[:place] + bytes([48 + (data[place] - 48 + rng.randint(1, 9)) % 10]) + data[place + 1 :]


CHANGES = (flip, flip, zeros, noise, cut, grow, remove, repeat, swap, digit)


def readers(folder: Path) -> dict[str, Callable[[], bytes]]:
    """For each kind of folder or file, a function that reads every value of it."""

    def store() -> bytes:
        opened = LatentStore(folder / "store")
        names = [*opened.names, *opened.skipped, opened.fingerprint, repr(opened.plan)]
        return kills._plain([names, opened.rows(range(len(opened))), opened.labels])

    def tokens() -> bytes:
        file = load_tokens(folder / "tokens")
        return kills._plain([file.indices, [*file.names], file.skipped, file.model, [*file.codes_per_position]])

    def model() -> bytes:
        loaded = ReVQ.from_pretrained(folder / "run" / "model")
        origin = read_origin(folder / "run" / "model" / "tokenizer.json")
        return kills._plain([loaded.state_dict(), list(origin), repr(loaded.config)])

    def checkpoint() -> bytes:
        return kills._plain(load_checkpoint(folder / "run" / "checkpoint.pt"))

    def log() -> bytes:
        return kills._plain(read_records(folder / "run" / "metrics.jsonl"))

    return {
        "store": store,
        "tokens": tokens,
        "run/model": model,
        "run/checkpoint.pt": checkpoint,
        "run/metrics.jsonl": log,
    }


def corrupt(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Corrupt each file in turn, ``count`` times in all, and restore it."""
    rng, outcomes, reading = random.Random(seed), [], readers(folder)
    truth = {name: read() for name, read in reading.items()}
    files = sorted(
        (path, name)
        for name in reading
        for path in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
        if path.is_file()
    )
    for number in range(count):
        path, name = files[number % len(files)]
        whole, change = path.read_bytes(), rng.choice(CHANGES)
        changed = change(whole, rng)
        path.write_bytes(changed)
        label = path.relative_to(folder).as_posix()
        try:
            value = reading[name]()
        except InputError as error:
            verdict, detail = ("refused", "") if "\n" not in str(error) else ("traceback", "more than one line")
        except Exception as error:
            verdict, detail = "traceback", f"{type(error).__name__}: {error}"
        else:
            exempt = path.name in EXEMPT
            verdict, detail = "same" if value == truth[name] else "exempt" if exempt else "silent", ""
        if changed == whole:
            verdict = "same"
        outcomes.append(Outcome(label, change.__name__, verdict, detail))
        path.write_bytes(whole)
    return outcomes


def make_files(folder: Path) -> None:
    """One of each of our files: a store, a token file, a run with its checkpoint, log and model."""
    kills.verbs(folder)  # makes them as the inputs of its verbs
    shutil.rmtree(folder / "photos")


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512, 4096)))


def main(argv: Sequence[str] | None = None) -> int:
    """Corrupt files; returns 1 if a corruption is silent or ends in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name))
        outcomes = corrupt(Path(name), options.count, options.seed)
    for file in sorted({outcome.file for outcome in outcomes}):
        mine = [outcome.verdict for outcome in outcomes if outcome.file == file]
        print(f"{file}: " + ", ".join(f"{mine.count(kind)} {kind}" for kind in sorted(set(mine))))
    wrong = [outcome for outcome in outcomes if outcome.verdict in ("silent", "traceback")]
    print(*wrong, sep="\n")
    print(f"{len(outcomes)} corruptions, {len(wrong)} silent or with a traceback")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
