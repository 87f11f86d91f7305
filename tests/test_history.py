"""A history grows, its links are checked, and whatever was changed in it is told."""

import json

import pytest

from sparring.errors import DamageError, UserError
from sparring.history import append_entry, read_history


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        append_entry(tmp_path, {"kind": "look", "look": number + 1, "p": {"claim": float("nan")}})
    return tmp_path


def test_entries_come_back_in_order_each_with_the_hash_of_the_one_before(folder):
    entries = read_history(folder)
    assert [entry["look"] for entry in entries] == [1, 2, 3]
    assert [entry["previous"] for entry in entries] == ["", entries[0]["sha256"], entries[1]["sha256"]]
    assert entries[0]["p"] == {"claim": None}  # as JSON has no NaN
    assert read_history(folder / "elsewhere") == []


def test_appending_leaves_what_is_there_as_it_is(folder):
    before = (folder / "history.jsonl").read_bytes()
    append_entry(folder, {"kind": "look", "look": 4})
    assert (folder / "history.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("change", ["a number", "a line less", "two lines swapped", "half a line", "no JSON", "a list"])
def test_a_broken_chain_is_refused_with_its_line(folder, change):
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines()
    broken = {
        "a number": [lines[0], lines[1].replace('"look":2', '"look":5'), lines[2]],
        "a line less": [lines[0], lines[2]],
        "two lines swapped": [lines[0], lines[2], lines[1]],
        "half a line": [*lines[:2], lines[2][:40]],
        "no JSON": [lines[0], "[" * 5000, lines[2]],
        "a list": [lines[0], "[1]", lines[2]],
    }[change]
    path.write_text("\n".join(broken) + "\n")
    with pytest.raises(DamageError, match=r"line [23]; restore it, or move it away"):
        read_history(folder)
    with pytest.raises(DamageError):
        append_entry(folder, {"kind": "look"})


def test_an_entry_that_was_made_anew_without_its_followers_breaks_the_chain(folder):
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines()
    second = json.loads(lines[1])
    path.write_text(lines[0] + "\n")
    append_entry(folder, {name: second[name] for name in ("kind", "time", "p")} | {"look": 7})
    forged = path.read_text() + lines[2] + "\n"
    path.write_text(forged)
    with pytest.raises(DamageError, match="line 3"):
        read_history(folder)


def test_a_history_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot"):
        append_entry(tmp_path / "file", {"kind": "look"})
