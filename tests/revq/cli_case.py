"""The command line for the tests: calls in this process and in another, and what they leave in a folder."""

import os
import subprocess
import sys
from pathlib import Path

from revq.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model.num-tokens", "16", "--model.num-codes", "8", "--model.rectifier.kind", "mlp", "--train.epochs", "2"]


def revq_main(*arguments):
    return main([str(argument) for argument in arguments])


def subprocess_revq(*arguments, code="import sys; from revq.cli import main; sys.exit(main())"):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def tree(folder):
    return {path.relative_to(folder).as_posix(): content for path, content in snapshot(folder).items()}
