"""Looks at a study: earlier reports on its folder, sparsities that its plan dropped, and its registration.

A look is a judged plan with its records. The same plan with the same records is the same look, however often its
report is made; another one is written to history.jsonl. At later looks, p-values are multiplied by a larger factor
(`look_price`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import DamageError
from ...files import canonical_json, sha256_bytes
from ...history import append_entry, read_history
from ...records import Folder, Record, read_record
from ...statistics import Question, Row, judge
from .. import _numbers as numbers
from ._records import Looks, Study, attack_label, load

DISPLAY = ("title", "mark")  # what may change in a plan without changing its questions
ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth")
# Fields of a look: a valid chain may still contain entries that no version wrote.
LOOK: dict[str, type] = {"look": int, "state": str, "seeds": int, "sparsities": dict, "attacks": list}
LOOK |= {"records": int, "orphans": int, "unknown": bool, "tests": dict}


def open_study(out: Any) -> Study:
    """Read a study's folder with its current look; raises as `load` does, and if its history is broken."""
    study = load(out)
    entries = read_history(study.folder)
    folder, orphans = Folder(study.folder), _orphans(study)
    looks = [entry for entry in entries if entry["kind"] == "look"]
    if not all(isinstance(look.get(name), kind) for look in looks for name, kind in LOOK.items()):
        raise DamageError(f"{study.folder} has a history with an invalid entry; restore the file, or move it away")
    state = _state(study)
    known = next((entry for entry in looks if entry["state"] == state), None)
    number = int(known["look"]) if known else 1 + max((int(entry["look"]) for entry in looks), default=0)
    found = Looks(
        number=number,
        state=state,
        entries=tuple(looks),
        dropped=_dropped(study, looks, orphans),
        orphans=len(orphans),
        registered=next((entry for entry in reversed(entries) if entry["kind"] == "registered"), None),
        unknown=looks[0]["unknown"] if looks else any(path.exists() for path in (folder.report, folder.ledger)),
    )
    return replace(study, looks=found)


def note_look(study: Study, asked: Sequence[Question]) -> Study:
    """Write a study's current look to its history, unless it is the last entry; return the study with it."""
    looks = study.looks
    noted = bool(looks.entries) and looks.entries[-1]["state"] == looks.state
    if noted or not os.access(study.folder, os.W_OK):  # a reader of someone else's folder cannot write to it
        return study
    attacks = {attack_label(record) for record in study.records.values() if record.stage == "attack"}
    entry = {
        "kind": "look",
        "look": looks.number,
        "state": looks.state,
        "plan": sha256_bytes(canonical_json(study.plan).encode()),
        "seeds": len({network.seed for network in study.networks}),
        "sparsities": {method: list(found) for method, found in _grid(study).items()},
        "attacks": sorted(attacks),
        "records": len(study.records),
        "orphans": looks.orphans,
        "unknown": looks.unknown,
        "tests": {
            q.claim.key: {"claim": q.claim.text, "p": q.p, "primary": q.claim.primary}
            for q in asked
            if not math.isnan(q.p)
        },
    }
    written = append_entry(study.folder, entry)
    return replace(study, looks=replace(looks, entries=(*looks.entries, written)))


def dropped_tests(study: Study, asked: Sequence[Question]) -> list[bool]:
    """Return, for each test of earlier looks that is no longer made but still counts, whether it was primary."""
    before = {name: bool(test["primary"]) for entry in study.looks.entries for name, test in entry["tests"].items()}
    return [primary for name, primary in before.items() if name not in {q.claim.key for q in asked}]


def judge_study(study: Study, asked: Sequence[Question]) -> list[Row]:
    """Return a study's claims with their verdicts, at its current look."""
    return judge(asked, study=study.name, dropped=dropped_tests(study, asked))


def _state(study: Study) -> str:
    """Return the hash of what is judged: the plan without its titles, and its records."""
    plan = {name: value for name, value in study.plan.items() if name not in DISPLAY}
    records = {key: record.checksum() for key, record in study.records.items()}
    return sha256_bytes(canonical_json([plan, records]).encode())


def _grid(study: Study) -> dict[str, tuple[float, ...]]:
    """Return the sparsities of every method."""
    return {method: tuple(study.sparsities(method)) for method in study.methods}


def _orphans(study: Study) -> list[Record]:
    """Return the records in the folder that neither the plan nor the parents of its records name."""
    every = dict(study.records)
    for path in sorted(Folder(study.folder).records.glob("*.json")):
        with contextlib.suppress(DamageError):  # a damaged record that is not needed
            if path.stem not in every and (record := read_record(study.folder, path.stem)) is not None:
                every[path.stem] = record
    known, fresh = {*study.records, *study.missing}, set(study.records)
    while fresh:  # candidates of a choice have no cell of their own
        parents = {str(k) for key in fresh if key in every for k in every[key].inputs.get("parents", ())}
        fresh = parents - known
        known |= fresh
    return [record for key, record in every.items() if key not in known]


def _dropped(
    study: Study, looks: Sequence[Mapping[str, Any]], orphans: Sequence[Record]
) -> dict[str, tuple[float, ...]]:
    """Return, by method, the sparsities that were looked at, or pruned to, and are no longer in the plan."""
    pruned = {
        (s, _way(r)) for r in orphans if r.stage == "prune" and isinstance(s := r.inputs.get("sparsity"), int | float)
    }
    found = {}
    for method, grid in _grid(study).items():
        ways = {_way(r) for network in study.of(method) for r in network.stage("prune")}
        before = {float(s) for entry in looks for s in entry["sparsities"].get(method, ())}
        gone = (before | {float(sparsity) for sparsity, way in pruned if way in ways}) - set(grid)
        if gone:
            found[method] = tuple(sorted(gone))
    return found


def _way(record: Record) -> str:
    return canonical_json(record.inputs.get("pruning"))


# -- words ------------------------------------------------------------------------------------------------------------


def look_sentences(study: Study) -> list[str]:
    """Return sentences on the number of looks, their correction, and the registration of the plan."""
    return [text for text in (_look(study), _registered(study)) if text]


def _look(study: Study) -> str:
    looks = study.looks
    before = [entry["seeds"] for entry in looks.entries if entry["state"] != looks.state]
    seeds = list(dict.fromkeys([*before, len({network.seed for network in study.networks})]))
    total = max([looks.number, *(int(entry["look"]) for entry in looks.entries)])
    again = f" of {total} at this folder" if total > looks.number else ""
    what = "groups of classes" if study.plan.get("linear") else "seed" if seeds == [1] else "seeds"
    told = [f"{_ordinal(looks.number)}{again}: {', '.join(map(str, seeds))} {what}"]
    grid = {method: list(found) for method, found in _grid(study).items()}
    others = {int(entry["look"]) for entry in looks.entries if entry["sparsities"] != grid}
    if others:
        told.append(f"{len(others)} of the looks had other sparsities")
    if looks.orphans:
        told.append(f"{looks.orphans:,} records belong to tasks that are no longer in the plan")
    for method, gone in looks.dropped.items():
        told.append(f"{method} at {', '.join(map(numbers.percent, gone))} was dropped but still counts as tested")
    if looks.unknown:
        told.append("a report was written before this history began, so earlier looks are unknown")
    told.append(f"p-values are multiplied by {looks.price:g}")
    return "; ".join(told) + "."


def _ordinal(number: int) -> str:
    return f"{ORDINALS[number - 1]} look" if number <= len(ORDINALS) else f"Look {number}"


def _registered(study: Study) -> str:
    entry = study.looks.registered
    if entry is None:
        return "The plan was not registered before the first record."
    table, plan = entry["table"], study.plan  # additions of later versions of the plan do not count
    settled = {"batch_size"} if table.get("batch_size") == "auto" else set()  # when the study began
    kept = settled | set(DISPLAY)
    changed = [name for name in table if name in plan and name not in kept and table[name] != plan[name]]
    when = f"The plan was registered before the first record, on {entry['time']} ({entry['plan'][:12]})"
    return f"{when}, and has changed since: {', '.join(changed)}." if changed else f"{when}, and has not changed since."
