"""Where everything lies in a study's folder."""

from __future__ import annotations

from pathlib import Path


class Folder:
    """Name the files of the study in `out`; nothing is opened or made."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.plan = self.out / "plan.json"
        self.records = self.out / "records"
        self.objects = self.out / "objects"
        self.scratch = self.out / "scratch"  # what long trainings have so far
        self.damaged = self.out / "damaged"  # what was set aside
        self.locked = self.out / ".lock"
        self.report = self.out / "report.html"
        self.results = self.out / "results.csv"
        self.ledger = self.out / "ledger.json"
        self.figures = self.out / "figures"

    def record(self, key: str) -> Path:
        """Return the file of a task's record."""
        return self.records / f"{key}.json"

    def object(self, key: str) -> Path:
        """Return the file of a task's tensors."""
        return self.objects / f"{key}.safetensors"

    def checkpoint(self, key: str) -> Path:
        """Return where a long training keeps what it has so far."""
        return self.scratch / f"{key}.safetensors"
