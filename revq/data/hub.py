"""Finds a named folder here or on the Hugging Face hub; a file of its own because models and VAEs both need it."""

import re
from pathlib import Path
from typing import NamedTuple

from revq.data.foreign import Failure, attempt
from revq.errors import InputError

_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)(?:@([^@\s]+))?")


class HubFolder(NamedTuple):
    """A folder of a hub repository, written ``owner/model/sub/folder@revision``; the last two parts may be missing."""

    repository: str
    subfolder: str
    revision: str | None

    def __str__(self) -> str:
        inner = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.repository}{inner}" + (f"@{self.revision}" if self.revision else "")

    def fetch(self, filename: str) -> Path:
        """The path of a file of the folder, see `fetch`."""
        path = f"{self.subfolder}/{filename}" if self.subfolder else filename
        return fetch(self.repository, path, self.revision)


def hub_folder(name: str, revision: str | None = None) -> HubFolder:
    """The hub folder that ``name`` describes.

    Args:
        revision: branch, tag or commit, unless the name has it.

    Raises:
        InputError: if the name is no hub id, or names another revision.
    """
    parts = _HUB_NAME.fullmatch(name)
    if parts is None:
        raise InputError(f"{name}: expected a hub id like owner/model, owner/model/subfolder or owner/model@revision")
    if revision is not None and parts[3] not in (None, revision):
        raise InputError(f"revision: expected that of the name {name}, got {revision}")
    return HubFolder(parts[1], parts[2].strip("/"), parts[3] or revision)


def find_folder(name: str | Path, what: str, *, inner: bool = False) -> Path | None:
    """The absolute path of the folder ``name``; None if ``name`` can only be a hub id such as ``owner/model``.

    Args:
        what: the kind of folder, for the message ("a VAE folder").
        inner: whether a hub id may name a subfolder and a revision (``owner/model/subfolder@revision``).

    Raises:
        InputError: if ``name`` is neither an existing folder nor a possible hub id.
    """
    if not isinstance(name, str | Path):
        raise InputError(f"{what}: expected a path or a hub id, got {type(name).__name__}")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        if path.exists():
            raise InputError(f"{name}: expected {what}, found a file")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL, a ~user that does not exist
        raise InputError(f"{str(name)[:200]!r}: expected {what} ({one_line(error)})") from error
    if len(path.parts) >= 2 and Path(path.parts[0]).is_dir():  # owner/ exists here: a mistyped path
        raise InputError(f"{name}: expected {what}, found nothing by that name in {path.parts[0]}/")
    pattern = _HUB_NAME if inner else re.compile(r"\w[\w.-]*/\w[\w.-]*")
    if isinstance(name, str) and pattern.fullmatch(name):
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
        path = attempt(lambda: hf_hub_download(repository, filename, revision=revision))
    finally:
        logging.set_verbosity(verbosity)
    if isinstance(path, Failure):
        raise InputError(
            f"{repository}: no such folder here, and cannot fetch {filename} of that hub id ({one_line(path.error)})"
        ) from path.error
    return Path(path)


def one_line(error: Exception) -> str:
    """The first sentence of an error message, on one line."""
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)]\.) ", text)[0][:300] or type(error).__name__
