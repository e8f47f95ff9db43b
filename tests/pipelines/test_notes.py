from pathlib import Path

import pytest

from pipelines.notes import Note, add_note, read_notes


def test_notes_come_back_in_order_with_their_details(tmp_path: Path) -> None:
    path = tmp_path / "run" / "notes.jsonl"
    assert read_notes(path) == []
    notes = [Note("death", "worker 1 died", {"1": "a\nb"}), Note("resume", "training goes on after step 3 ✓")]
    for note in notes:
        add_note(path, note)
    assert read_notes(path) == notes


def test_a_line_cut_short_costs_that_note_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    add_note(path, Note("resume", "first"))
    with path.open("ab") as file:
        file.write(b'\n{"kind": "dea')
    add_note(path, Note("resume", "last"))
    assert [note.text for note in read_notes(path)] == ["first", "last"]


def test_a_note_that_cannot_be_written_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    add_note(Path("/dev/full"), Note("checkpoint", "no room"))
    assert "no room (not recorded: [Errno 28]" in caplog.text
