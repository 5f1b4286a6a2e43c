"""Draws files for the reading test (docs/reading-test.md) and prints what their comments and docstrings alone say.

    python scripts/reading_test.py SEED          # the names of the 20 files
    python scripts/reading_test.py SEED OUT      # and OUT/<number>.txt: each without its code

A reader who has not seen the code explains each file from this text.  What a reader gets wrong is rewritten.
"""

import io
import random
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("revq/", "revq_kernels/", "csrc/", "benchmarks/", "setup.py")
DRAWN = 20


def candidates() -> list[str]:
    """Every source file of the product and the benchmarks, sorted."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return sorted(n for n in names if n.startswith(PLACES) and n.endswith((".py", ".cpp", ".h", ".inl")))


def prose(path: Path) -> str:
    """The comments and docstrings of a file in their order; of Python files, also the names that are defined."""
    text = path.read_text()
    if path.suffix != ".py":
        return "\n".join(match.group() for match in re.finditer(r"//[^\n]*|/\*.*?\*/", text, re.S))
    kept, line_start = [], True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and line_start and token.string.lstrip("rR").startswith('"""')
        if token.type == tokenize.COMMENT or is_docstring:
            kept.append(token.string)
        elif token.type == tokenize.NAME and token.string in ("def", "class"):
            kept.append(re.sub(r"\(.*", "", token.line.strip()))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            line_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    return "\n".join(kept)


def main() -> None:
    """Print the drawn names; write their prose where a folder is given."""
    names = random.Random(int(sys.argv[1])).sample(candidates(), DRAWN)
    for number, name in enumerate(names, 1):
        print(f"{number:2d} {name}")
        if len(sys.argv) > 2:
            out = Path(sys.argv[2])
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{number:02d}.txt").write_text(prose(ROOT / name) + "\n")


if __name__ == "__main__":
    main()
