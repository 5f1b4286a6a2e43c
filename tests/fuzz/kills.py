"""Kills encode, train, tokenize and detokenize at every file-system event and at random times; each has to resume.

Usage: ``python -m tests.fuzz.kills [--verbs encode train ...] [--events N] [--times N]``

After a kill, no output is visible that is not whole; the same call ends as if nothing had happened: byte-identical files
and nothing beside them.  Children are forked from one warm process, which computes on one thread: forks inherit no others.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig
from revq.data.encode import encode_folder
from revq.data.images import image_files
from revq.data.latents import LatentStore
from revq.data.vae import load_vae
from revq.tokenizer import Tokenizer, detokenize_file, tokenize_files
from revq.train import train

EVENTS = frozenset(
    {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
)
"""Audit events of the interpreter that change the file system or come right before a change."""


class Verb(NamedTuple):
    """A call that writes to a folder."""

    name: str
    call: Callable[[Path], object]
    outputs: tuple[str, ...]
    """What is in the folder afterwards."""


class Report(NamedTuple):
    """What happened to the kills of one verb."""

    verb: str
    kills: int
    failures: list[str]


def verbs(folder: Path) -> list[Verb]:
    """The four verbs on small inputs, which are made in ``folder``."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "revq"))
    from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

    photos, vae = folder / "photos", load_vae(save_tiny_vae(folder / "vae"))
    save_photos(photos, 9)
    (photos / "damaged.png").write_bytes((photos / "photo-01.png").read_bytes()[:200])
    files = image_files([photos]).files
    options = {"image_size": IMAGE_SIZE, "crops": 3, "batch_size": 4, "shard_bytes": 6 * 1024, "progress": False}

    def encode(out: Path) -> None:
        encode_folder(photos, vae, out=out / "store", **options)

    encode(folder)
    store = LatentStore(folder / "store")
    rectifier = RectifierConfig("cnn", width=16, layers=1)
    config = RunConfig(
        "kills",
        ModelConfig(LATENT_SHAPE, num_tokens=16, num_codes=8, rectifier=rectifier),
        TrainConfig(epochs=4, batch_size=7, checkpoint_every=1),
    )

    def fit(out: Path) -> None:
        train(config, store, out / "run", validation=store, progress=False)

    fit(folder)
    tokenizer = Tokenizer.from_pretrained(folder / "run" / "model", vae=vae)

    def tokenize(out: Path) -> None:
        tokenize_files(tokenizer, files, out / "tokens", batch_size=2, progress=False)

    tokenize(folder)

    def detokenize(out: Path) -> None:
        detokenize_file(tokenizer, folder / "tokens", out / "pictures", batch_size=2, progress=False)

    return [
        Verb("encode", encode, ("store",)),
        Verb("train", fit, ("run",)),
        Verb("tokenize", tokenize, ("tokens",)),
        Verb("detokenize", detokenize, ("pictures",)),
    ]


def kill_at_events(verb: Verb, folder: Path, most: int | None = None) -> Report:
    """Kill the verb before its first, second, ... event on a file of its output; at most ``most`` of them, spread."""
    expected, total = _run_to_the_end(verb, folder / "expected")
    places = range(1, total + 1) if most is None else sorted({1 + place * total // most for place in range(most)})
    failures = []
    for place in places:
        out = folder / f"event-{place}"
        out.mkdir()
        if _in_child(lambda out=out, place=place: _kill_before(place, verb, out)) != -signal.SIGKILL:
            failures.append(f"{verb.name}, event {place}: was not killed")
        failures += _resumes(verb, out, expected, f"event {place} of {total}")
        shutil.rmtree(out)
    return Report(verb.name, len(places), failures)


def kill_at_times(verb: Verb, folder: Path, count: int, seed: int) -> Report:
    """Kill the verb at ``count`` random times between its begin and its end."""
    expected, _ = _run_to_the_end(verb, folder / "expected")
    start = time.monotonic()
    (folder / "timed").mkdir()
    _in_child(lambda: verb.call(folder / "timed"))
    length, rng, failures, kills = time.monotonic() - start, random.Random(seed), [], 0
    while kills < count:
        out = folder / f"time-{kills}"
        out.mkdir()
        moment = rng.uniform(0, length)
        if _in_child(lambda out=out: verb.call(out), kill_after=moment) == -signal.SIGKILL:
            kills += 1
            failures += _resumes(verb, out, expected, f"after {moment:.4f} s")
        shutil.rmtree(out)
    return Report(verb.name, kills, failures)


def _run_to_the_end(verb: Verb, out: Path) -> tuple[dict[str, bytes], int]:
    """The files of an uninterrupted call, and the number of its events."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    counter = out.with_name("events")
    status = _in_child(lambda: counter.write_text(str(_count_events(verb, out))))
    if status:
        raise RuntimeError(f"{verb.name}: ends with {status} when nobody kills it")
    return _contents(out), int(counter.read_text())


def _count_events(verb: Verb, out: Path) -> int:
    seen = [0]
    _watch(out, lambda: seen.__setitem__(0, seen[0] + 1))
    verb.call(out)
    return seen[0]


def _kill_before(place: int, verb: Verb, out: Path) -> None:
    left = [place]

    def event() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(out, event)
    verb.call(out)


def _watch(out: Path, event: Callable[[], None]) -> None:
    """Call ``event`` before each operation of this process on a file below ``out``, and before it writes one to the disk."""
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        event()
        real_sync(descriptor)

    os.fsync = sync

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name in EVENTS and any(str(out) in str(argument) for argument in arguments[:2]):
            event()

    sys.addaudithook(hook)


def _in_child(call: Callable[[], object], kill_after: float | None = None) -> int:
    """Run ``call`` in a forked child; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _resumes(verb: Verb, out: Path, expected: dict[str, bytes], when: str) -> list[str]:
    """What is wrong after a kill: with what is visible, with the call that resumes, or with its result."""
    wrong = []
    if _contents(out) == expected:  # killed after the end; the same call may refuse what exists
        return wrong
    for name, content in _contents(out).items():
        top = name.split("/")[0]
        if top in verb.outputs and name in expected and content != expected[name] and verb.name != "train":
            wrong.append(f"{name} is visible and not whole")
    if code := _in_child(lambda: verb.call(out)):
        wrong.append(f"the same call ends with {code}")
    found = _contents(out)
    if found.keys() != expected.keys():
        wrong.append(f"files differ: {sorted(found.keys() ^ expected.keys())}")
    wrong += [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return [f"{verb.name}, killed {when}: {text}" for text in wrong]


def _contents(out: Path) -> dict[str, bytes]:
    """The bytes of all files by name; of a log without its times, of a checkpoint its tensors."""
    contents = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir():
            contents[name + "/"] = b""
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            contents[name] = json.dumps([{**line, "seconds": 0} for line in lines]).encode()
        elif path.name == "checkpoint.pt":  # its pickle depends on which equal texts were one object
            contents[name] = _plain(torch.load(path, weights_only=True))
        else:
            contents[name] = path.read_bytes()
    return contents


def _plain(value: object) -> bytes:
    """The bytes of a nest of dictionaries, lists, tensors and simple values."""
    if isinstance(value, dict):
        return b"{" + b",".join(repr(key).encode() + b":" + _plain(item) for key, item in value.items()) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(_plain, value)) + b"]"
    if isinstance(value, torch.Tensor):
        return (
            f"{value.dtype}{tuple(value.shape)}".encode()
            + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return repr(value).encode()


def main(argv: Sequence[str] | None = None) -> int:
    """Kill all verbs; returns 1 if one of them does not resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+", default=["encode", "train", "tokenize", "detokenize"])
    parser.add_argument("--events", type=int, help="kill at so many events of a verb; all of them by default")
    parser.add_argument("--times", type=int, default=30, help="kill each verb at so many random times")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    failures, kills = [], 0
    with tempfile.TemporaryDirectory() as name:
        for verb in verbs(Path(name)):
            if verb.name not in options.verbs:
                continue
            work = Path(name) / "work"
            work.mkdir()
            events = kill_at_events(verb, work, options.events)
            times = kill_at_times(verb, work, options.times, options.seed)
            shutil.rmtree(work)
            print(f"{verb.name}: {events.kills} kills at events, {times.kills} at random times", flush=True)
            kills += events.kills + times.kills
            failures += events.failures + times.failures
    print(*failures, sep="\n")
    print(f"{kills} kills, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
