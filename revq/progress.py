"""The progress bar of long stages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str, unit: str, total: int, *, done: int = 0, show: bool = True, scale: bool = False) -> "tqdm":
    """A bar on stderr over ``total`` units, of which an earlier call has ``done`` some; silent unless ``show``.

    Its rate is in units per second; ``scale`` writes large numbers short, as 512k.
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
