import pickle

import pytest
from ray.exceptions import ActorDiedError

from pipelines.failures import failure_note, hopeless
from pipelines.notes import Note

RESET = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection reset by peer")


def test_a_dead_worker_is_named_and_not_the_peers_that_miss_it() -> None:
    note = failure_note({0: RESET, 1: ActorDiedError(), 2: RESET})
    assert (note.kind, note.text) == ("death", "worker 1 died; starting again")
    assert "Connection reset by peer" in note.details["0"]


def test_a_loss_of_contact_alone_is_no_mistake_of_a_worker() -> None:
    assert failure_note({1: RESET, 0: RESET}).text == "worker 0, 1 lost its peers; starting again"


def test_a_workers_own_mistake_is_what_happened_whatever_its_peers_say() -> None:
    mistake = ValueError("bad\nmore")
    mistake.add_note("Traceback: line 7")
    # Ray carries it from worker to controller.
    note = failure_note({0: RESET, 1: pickle.loads(pickle.dumps(mistake))})
    assert (note.kind, note.text) == ("error", "worker 1 failed: ValueError: bad")
    assert note.details["1"] == "bad\nmore\nTraceback: line 7"


@pytest.mark.parametrize(
    ("kinds", "gives_up"),
    [
        ([], False),
        (["error a"], False),
        (["error a", "error a"], True),
        (["error a", "resume x", "error a"], True),
        (["error a", "error b"], False),
        (["error a", "death a", "error a"], False),
        (["death a", "death a", "death a"], False),
        (["error a", "error a", "death a"], False),
    ],
)
def test_only_the_same_error_twice_in_a_row_is_hopeless(kinds: list[str], gives_up: bool) -> None:
    notes = [Note(kind, text) for kind, text in (entry.split() for entry in kinds)]  # type: ignore[arg-type]
    assert hopeless(notes) == ("a" if gives_up else None)
