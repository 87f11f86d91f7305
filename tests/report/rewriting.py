"""Change what a study's folder says, through the writer that studies use: checksums are right afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from sparring.records import Record, Store, read_plan, read_record, tensor_bytes, write_plan


def records_of(out: Path) -> Iterator[Record]:
    """Yield every record of a folder."""
    for path in sorted((out / "records").glob("*.json")):
        record = read_record(out, path.stem)
        assert record is not None
        yield record


def rewrite(record: Record, *, edit: Callable[[dict[str, Any]], None] | None = None, **fields: Any) -> None:
    """Write a record again with other fields, and its tensors as `edit` leaves them."""
    assert record.folder is not None
    content = tensor_bytes(record)
    if edit is not None:
        held = load(content)
        edit(held)
        content = save(held)
    Store(record.folder).write(replace(record, **fields), content)


def rewrite_plan(out: Path, **changes: Any) -> None:
    """Write plan.json again with other settings of the plan, or other `cells`."""
    file = read_plan(out)
    cells = changes.pop("cells", file.cells)
    plan: Mapping[str, Any] = {**file.plan, **changes}
    write_plan(out, replace(file, plan=dict(plan), cells=cells))
