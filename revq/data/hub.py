"""Finds a named folder here or on the Hugging Face hub; a file of its own because models and VAEs both need it."""

import re
from pathlib import Path

from revq.errors import InputError


def find_folder(name: str | Path, what: str) -> Path | None:
    """The absolute path of the folder ``name``; None if ``name`` can only be a hub id such as ``owner/model``.

    Args:
        what: the kind of folder, for the message ("a VAE folder").

    Raises:
        InputError: if ``name`` is neither an existing folder nor a possible hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise InputError(f"{name}: expected {what}, found a file")
    if len(path.parts) == 2 and Path(path.parts[0]).is_dir():  # owner/ exists here: a mistyped path
        raise InputError(f"{name}: expected {what}, found nothing by that name in {path.parts[0]}/")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    raise InputError(f"{name}: expected {what} or a hub id like owner/model, found nothing by that name")


def fetch(repository: str, filename: str, revision: str | None = None) -> Path:
    """The path of one file of a hub repository, downloaded unless the local cache has it.

    Raises:
        InputError: if the repository or file does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hide the client's messages about retries: the error below reports the outcome
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    # The client raises its own errors, errors of its HTTP library and OSError.  The remedy is the same for all of them.
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
