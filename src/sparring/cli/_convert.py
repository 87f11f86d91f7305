"""`sparring convert`: weights out of a training tool's checkpoint, as a file that nothing has to be unpickled from."""

from __future__ import annotations

from pathlib import Path

from ..files import save_tensors
from ..models import read_checkpoint
from ._sources import check_out


def run_convert(checkpoint: Path, out: Path, key: str | None) -> int:
    """Write a checkpoint's weights to a safetensors file and say where in it they stood and what became of names."""
    check_out(out, ".safetensors")
    found = read_checkpoint(checkpoint, key=key)
    save_tensors(out, found.tensors)
    at = f" under '{found.key}'" if found.key else ""
    count = sum(value.numel() for value in found.tensors.values())
    print(f"{checkpoint}: {len(found.tensors)} tensors{at}, {count:,} numbers")
    for note in found.notes:
        print(f"  {note}")
    if found.others:
        print(f"  not taken: {', '.join(found.others)}; choose another by --key")
    print(f"wrote {out}")
    return 0
