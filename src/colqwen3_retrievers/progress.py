"""Progress bars, drawn on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from colqwen3_retrievers.errors import require


@contextlib.contextmanager
def progress_bar(shown: bool, total: int | None, unit: str) -> Iterator[Bar]:
    """Open a progress bar, or one that shows nothing.

    Args:
        shown: whether it is wanted.
        total: how many there will be; None when that is not known.
        unit: what it counts.

    Raises:
        MissingExtraError: it is wanted and tqdm is not installed.

    >>> with progress_bar(False, 3, "pages") as bar:
    ...     bar.update(1)
    """
    if not shown:
        yield Bar()
        return
    with require("torch", "tqdm").tqdm(total=total, unit=f" {unit}", disable=None) as bar:
        yield Bar(bar.update, bar.set_postfix_str)


class Bar:
    """A progress bar, which may show nothing."""

    def __init__(
        self,
        update: Callable[[int], object] = lambda _: None,
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.update = update
        self.note = note
