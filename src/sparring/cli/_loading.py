"""Load data for a command, with a progress bar while something is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .. import data
from ..data import Dataset


def open_data(name: str, data_dir: Path | None, download: bool) -> Dataset:
    """Load a data set; raise as `data.load` does."""
    if not download:
        return data.load(name, data_dir)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        rows = {}

        def show(file: str, here: int, total: int | None) -> None:
            if file not in rows:
                rows[file] = bar.add_task(file)
            bar.update(rows[file], completed=here, total=total)

        return data.load(name, data_dir, download=True, progress=show)
