"""Separate because it is the only place of revq that catches every error: the boundary to other people's decoders and loaders.

Pillow, torch, diffusers, safetensors and the hub's client raise dozens of unrelated types for a damaged file or a lost
connection, and other ones in their next version.  For their users all of these mean the same: this cannot be read.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")


class Failure(NamedTuple):
    """What a call raised."""

    error: Exception


def attempt(step: Callable[[], _T]) -> _T | Failure:
    """The result of ``step``, a call of another library, or what it raised; interruptions pass through."""
    try:
        return step()
    except Exception as error:
        return Failure(error)
