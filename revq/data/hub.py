"""Where a name points: a folder here, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from revq.errors import InputError


def find_folder(name: str | Path, what: str) -> Path | None:
    """The folder that ``name`` is, made absolute; None if it can only be a hub id such as ``owner/model``.

    Args:
        what: what is looked for, for the message ("a VAE folder").

    Raises:
        InputError: if it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise InputError(f"{name}: expected {what}, found a file")
    if len(path.parts) == 2 and Path(path.parts[0]).is_dir():  # a path with a slip in it rather than a repository
        raise InputError(f"{name}: expected {what}, found nothing by that name in {path.parts[0]}/")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    raise InputError(f"{name}: expected {what} or a hub id like owner/model, found nothing by that name")


def fetch(repository: str, filename: str, revision: str | None = None) -> Path:
    """Download one file of a hub repository, or take it from the local cache.

    Raises:
        InputError: if the repository or file does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its lines about retries; the error below says what came of them
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    # The hub's client raises its own errors, those of its HTTP library and OSError: all mean the same to the user.
    except Exception as error:
        raise InputError(
            f"{repository}: no such folder here, and cannot fetch {filename} of that hub id ({one_line(error)})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def one_line(error: Exception) -> str:
    """The first sentence of an error message, on one line."""
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)]\.) ", text)[0][:300] or type(error).__name__
