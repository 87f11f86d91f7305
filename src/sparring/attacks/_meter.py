"""Estimate how far an attack is, from the images that are done and from the passes of those in work."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, float, int], None]  # a stage, how many images are done, and of how many
_PAUSE = 0.2  # seconds between two messages from inside a batch


def with_title(title: str, progress: Progress | None) -> Progress | None:
    """Return progress that puts a title before each stage."""
    return progress and (lambda stage, done, images: progress(f"{title}, {stage}", done, images))


class Meter:
    """Report the number of images that are done in a stage; an image in work counts by its share of `each` passes.

    together: images that are in work at a time. Nothing is told from inside a batch that takes longer than estimated,
    nor at the end of a stage that took less than `patience` seconds.
    """

    def __init__(
        self, progress: Progress | None, stage: str, images: int, *, each: float = 1, together: int, patience: float = 0
    ) -> None:
        self.progress, self.stage, self.images = progress, stage, images
        self.each, self.together = each, together
        self.done, self.passes, self.told = 0, 0.0, 0.0
        self.due = time.monotonic()
        self.long = self.due + patience
        self._tell(0)

    def pass_(self, images: int) -> None:
        """Count a pass of so many images, in any thread."""
        self.passes += images
        if self.progress is not None and (now := time.monotonic()) >= self.due:
            self.due = now + _PAUSE
            in_work = self.passes / self.each
            if in_work < min(self.together, self.images - self.done):
                self._tell(self.done + in_work)

    def finish_(self, images: int) -> None:
        """Set the number of images that are done, and report it."""
        self.passes = max(0.0, self.passes - self.each * (images - self.done))  # the rest is another batch's
        self.done = images
        if images < self.images or time.monotonic() >= self.long:
            self._tell(images)

    def _tell(self, images: float) -> None:
        if self.progress is not None and images >= self.told:  # batches of several threads are counted together
            self.told = images
            self.progress(self.stage, images, self.images)
