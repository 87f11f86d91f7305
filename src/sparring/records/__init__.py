"""The files of a study: their schema and paths, one reader that verifies them, and one writer."""

from __future__ import annotations

from ._reader import Folder, arrays, image_places, read_plan, read_record, tensor_bytes
from ._schema import (
    CELLS,
    STAGES,
    Cell,
    Checkpoint,
    DatasetFacts,
    Kind,
    PlanFile,
    Record,
    pruning_kind,
)
from ._store import Store, write_plan

__all__ = [
    "CELLS",
    "STAGES",
    "Cell",
    "Checkpoint",
    "DatasetFacts",
    "Folder",
    "Kind",
    "PlanFile",
    "Record",
    "Store",
    "arrays",
    "image_places",
    "pruning_kind",
    "read_plan",
    "read_record",
    "tensor_bytes",
    "write_plan",
]
