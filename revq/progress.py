"""The progress bar of long stages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str, unit: str, total: int, *, done: int = 0, show: bool = True) -> "tqdm":
    """A bar on stderr over ``total`` units, of which an earlier call has ``done`` some; silent unless ``show``."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not show, mininterval=0.5, dynamic_ncols=True)
