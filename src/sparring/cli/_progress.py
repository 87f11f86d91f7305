"""Progress of work that takes longer than two seconds: bars and lines on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..progress import pace
from ..ram import size_text, used_memory
from ..train import predict
from ..units import duration

PATIENCE = 2.0  # seconds
LONG = 40  # characters before a bar


class Pace:
    """Measure how fast a count grows from now on, and from the `first` that is done."""

    def __init__(self, first: float = 0) -> None:
        self.began, self.first = time.monotonic(), first

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.monotonic() - self.began

    def told(self, done: float, total: int, what: str = "images") -> str:
        """Return how many are done, how many a second, the memory in use, and the time for the rest."""
        memory = size_text(used_memory(children=True))
        return pace(done, total, self.seconds, memory=memory, what=what, first=self.first)


Tell = Callable[[str, float, int], None]  # a name, how many are done, and of how many
Draw = Callable[[str, int, int | None, int], None]  # a name, bytes done, of how many, images of the whole or 0


class _Line:
    """Show counts: on one line of a terminal, else in a line for every tenth; what is quick is not shown."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name
        self.stream = sys.stderr  # the one of now: sys.stderr is silenced while torch captures a network
        self.terminal = self.stream.isatty()
        self.began, self.pace = Pace(), Pace()
        self.done, self.total, self.tenth = 0.0, 0, -1.0

    def tell(self, name: str, done: float, total: int) -> None:
        if done == 0 or done < self.done or total != self.total:
            self.pace, self.tenth = Pace(done), -1
        self.name, self.done, self.total, tenth = name, done, total, 10 * done // max(1, total)
        if done > self.pace.first and self.began.seconds >= PATIENCE and (self.terminal or tenth > self.tenth):
            self.tenth = tenth
            self.write(f"{name}: {self.pace.told(done, total, self.what)}")

    def say_again(self, seconds: float) -> None:
        """Say what was told last, at the pace that it has now; nothing is told for so many seconds."""
        known = self.pace.first < self.done < self.total
        self.write(
            f"{self.name}: {self.pace.told(self.done, self.total, self.what)}"
            if known
            else _at_work(self.name, seconds)
        )

    def write(self, text: str) -> None:
        print(f"\r{text}\033[K" if self.terminal else f"{text}\n", end="", file=self.stream, flush=True)


@contextlib.contextmanager
def shown_images(what: str = "images", name: str = "preparing") -> Iterator[Tell]:
    """Yield a function of a name, the images that are done and their number: one line, or one for every tenth.

    `what` is counted instead of images. What tells nothing for two seconds is shown by its seconds and the memory,
    under the last name; `name` is that of what comes first.
    """
    line = _Line(what, name)
    with _silence(line.say_again, every=line.terminal) as heard:

        def tell(name: str, done: float, total: int) -> None:
            heard()
            line.tell(name, done, total)

        try:
            yield tell
        finally:
            if line.terminal:
                line.write("")


def predicted(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return the logits (N, classes) of uint8 images, and show how many are done."""
    with shown_images() as tell:
        return predict(model, x, seconds=PATIENCE / 2, progress=functools.partial(tell, name))


def _at_work(name: str, seconds: float) -> str:
    return f"{name}: {duration(seconds)} so far, {size_text(used_memory(children=True))}"


@contextlib.contextmanager
def _silence(say: Callable[[float], None], *, every: bool) -> Iterator[Callable[[], None]]:
    """Yield what is to be called when something is told; while it is not, say for how many seconds.

    Say so from the second second on, `every` second, or when twice as many have passed.
    """
    ended, last = threading.Event(), [time.monotonic()]

    def watch() -> None:
        said = 0.0
        while not ended.wait(PATIENCE / 4):
            silent = time.monotonic() - last[0]
            if silent < PATIENCE:
                said = 0.0
            elif silent >= (said + 1 if every else 2 * said):
                said = silent
                say(silent)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: last.__setitem__(0, time.monotonic())
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def shown_bytes(name: str = "reading the data") -> Iterator[Draw]:
    """Give what takes a name, the bytes that are done, those of the whole, and its images: bars, or plain lines.

    What tells of no bytes is shown under `name`, as by `shown_images`.
    """
    with contextlib.ExitStack() as stack:
        draw: Draw | None = None if sys.stderr.isatty() else _tenths()

        def say(seconds: float) -> None:
            if draw is None or not sys.stderr.isatty():  # a bar moves by itself
                print(_at_work(name, seconds), file=sys.stderr, flush=True)

        def tell(name: str, done: int, total: int | None, images: int) -> None:
            nonlocal draw
            heard()
            draw = draw or stack.enter_context(_bars())
            draw(name, done, total, images)

        heard = stack.enter_context(_silence(say, every=False))
        yield tell


@contextlib.contextmanager
def _bars() -> Iterator[Draw]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[speed]}"))
    rows, speed = dict[str, TaskID](), _Speed()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:

        def draw(name: str, done: int, total: int | None, images: int) -> None:
            if name not in rows:
                if len(name) > LONG:  # or the numbers have no room
                    bar.console.print(name, highlight=False)
                rows[name] = bar.add_task(name if len(name) <= LONG else "", speed="")
            bar.update(rows[name], completed=done, total=total, speed=speed.told(name, done, total, images))

        yield draw


class _Speed:
    """Tell images a second, where images are counted, the memory in use, and the time for the rest."""

    def __init__(self) -> None:
        self.paces: dict[str, Pace] = {}

    def told(self, name: str, done: int, total: int | None, images: int) -> str:
        own = self.paces.setdefault(name, Pace(done))
        memory = size_text(used_memory(children=True))
        if not total or done <= own.first:
            return memory
        rate = images * (done - own.first) / total / max(own.seconds, 1e-9)
        fast = f"{rate:,.0f} images/s, " if images else ""
        left = f", about {duration(own.seconds * (total - done) / (done - own.first))} left" if done < total else ""
        return f"{fast}{memory}{left}"


def _tenths() -> Draw:
    """Return a function that prints one line at the beginning, and one more for every tenth that is done."""
    told, speed = dict[str, int](), _Speed()

    def tell(name: str, done: int, total: int | None, images: int) -> None:
        tenth = 10 * done // total if total else 0
        fast = speed.told(name, done, total, images)
        if tenth > told.get(name, -1):
            print(f"  {10 * tenth}%, {fast}" if name in told else name, file=sys.stderr, flush=True)
        told[name] = tenth

    return tell
