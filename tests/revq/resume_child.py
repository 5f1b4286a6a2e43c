"""Runs one training in its own process and kills it (SIGKILL) at a named moment: ``resume_child.py STORE OUT MOMENT N``.

The package has no hook for this, so the moment is monkeypatched.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from pipeline_case import tiny_run

from revq.data.latents import LatentStore
from revq.model.revq import ReVQ
from revq.train.loop import train
from revq.train.track import Tracker


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number, function, action):
    """``function`` until its call ``number``, counted from 1, which is ``action``."""
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        return (action if calls == number else function)(*args, **kwargs)

    return wrapper


def of_checkpoint(function, wrapped):
    """``wrapped`` for replacements of checkpoint.pt, plain ``function`` for the others."""
    return lambda path, target: (wrapped if Path(target).name == "checkpoint.pt" else function)(path, target)


def half_a_file(state, path):
    whole_save(state, path)
    os.truncate(path, Path(path).stat().st_size // 2)
    die()


def half_a_line(self, **record):
    self._file.write('{"kind": "step", "st')
    self._file.flush()
    die()


def replace_then_die(source, target):
    whole_replace(source, target)
    die()


whole_save, whole_replace, whole_fsync = torch.save, os.replace, os.fsync


def patch(moment, number):
    if moment == "step":
        ReVQ.forward = on_call(number, ReVQ.forward, die)
    elif moment == "half a checkpoint":
        torch.save = on_call(number, torch.save, half_a_file)
    elif moment == "sync of a checkpoint":  # each write syncs the file (odd calls), then its folder
        os.fsync = on_call(number, os.fsync, die)
    elif moment == "before the replacement":
        os.replace = of_checkpoint(os.replace, on_call(number, os.replace, die))
    elif moment == "after the replacement":
        os.replace = of_checkpoint(os.replace, on_call(number, os.replace, replace_then_die))
    elif moment == "half a line of the log":
        Tracker.log = on_call(number, Tracker.log, half_a_line)
    elif moment == "before the model is saved":
        Path.rename = on_call(number, Path.rename, die)
    else:
        assert moment == "never"


if __name__ == "__main__":
    folder, out, moment, number = sys.argv[1:]
    torch.set_num_threads(2)
    patch(moment, int(number))
    run = tiny_run(codes=48, epochs=4, checkpoint_every=4)  # 48 codes for 200 vectors: every reset moves some
    train(run, LatentStore(folder), out, validation=LatentStore(folder), log_every=1, progress=False)
