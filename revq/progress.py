"""Separate because encoding, training and tokenizing share it and tqdm loads on first use: the progress bar."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str, unit: str, total: int, *, done: int = 0, show: bool = True, scale: bool = False) -> "tqdm":
    """A progress bar on stderr; prints nothing unless ``show``.

    Args:
        what: label in front of the bar.
        unit: name of one unit of work; the rate is shown in units per second.
        total: units of the whole task.
        done: units that an earlier, interrupted call has finished.
        show: False disables the bar.
        scale: abbreviate large counts, such as 512k.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=scale,
        disable=not show,
        mininterval=0.5,
        dynamic_ncols=True,
    )
