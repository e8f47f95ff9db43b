"""Which points MLflow gets while training may still go back."""

from pipelines.outbox import Outbox
from pipelines.spool import REWIND, START, TRAIN, VALIDATION, Record


def step(number: int, loss: float, kind: str = TRAIN) -> Record:
    name = "train/loss" if kind == TRAIN else "val/loss"
    return Record(kind, number, 1000 + number, {name: loss, "moe/max_vio_batch": 0.1})


def rewind(number: int) -> Record:
    return Record(REWIND, number, 0, {})


def points(records: list[Record]) -> list[tuple[str, int, float]]:
    return [(name, r.step, value) for r in records for name, value in r.metrics.items() if "loss" in name]


def test_the_newest_steps_wait_and_the_end_brings_them() -> None:
    outbox = Outbox(3, {})
    outbox.add([Record(START, 0, 0, {"model/parameters": 5.0}), *(step(n, float(n)) for n in range(1, 6))])
    due = outbox.due(everything=False)
    assert [record.step for record in due] == [0, 1, 2]
    outbox.sent(due)
    assert outbox.due(everything=False) == []
    assert [record.step for record in outbox.due(everything=True)] == [3, 4, 5]


def test_steps_that_were_taken_back_while_they_waited_are_of_another_name() -> None:
    outbox = Outbox(4, {})
    outbox.add([step(n, float(n)) for n in range(1, 7)] + [step(6, 9.0, VALIDATION), rewind(3)])
    outbox.add([step(n, n + 0.5) for n in range(4, 11)])
    due = outbox.due(everything=True)
    assert points(due) == [
        *(("train/loss", n, float(n)) for n in (1, 2, 3)),
        *(("rewound/loss", n, float(n)) for n in (4, 5, 6)),
        ("rewound/val_loss", 6, 9.0),
        *(("train/loss", n, n + 0.5) for n in range(4, 11)),
    ]
    assert all("moe/max_vio_batch" not in record.metrics for record in due if record.kind.startswith("rewound"))


def test_a_spike_keeps_its_mark_when_it_is_taken_back() -> None:
    outbox = Outbox(4, {})
    outbox.add([Record(TRAIN, 1, 0, {"train/loss": 9.0, "spike/loss_at_spike": 9.0, "spike/count": 1.0}), rewind(0)])
    assert points(outbox.due(everything=True)) == [("rewound/loss", 1, 9.0), ("spike/loss_at_spike", 1, 9.0)]


def test_what_mlflow_has_of_steps_that_a_deeper_rewind_repeats_stays_single() -> None:
    outbox = Outbox(2, {})
    outbox.add([step(n, float(n)) for n in range(1, 9)])
    due = outbox.due(everything=False)
    assert [record.step for record in due] == [1, 2, 3, 4, 5, 6]
    outbox.sent(due)
    outbox.add([rewind(2), *(step(n, n + 0.5) for n in range(3, 9))])
    again = Outbox(2, outbox.delivered)
    again.add([step(7, 7.0), step(8, 8.0), rewind(2), *(step(n, n + 0.5) for n in range(3, 9))])
    for box in (outbox, again):
        found = points(box.due(everything=True))
        assert found == [
            ("rewound/loss", 7, 7.0),
            ("rewound/loss", 8, 8.0),
            ("train/loss", 7, 7.5),
            ("train/loss", 8, 8.5),
        ]


def test_a_delivery_that_fails_half_way_is_made_up_from_where_it_was() -> None:
    outbox = Outbox(0, {})
    outbox.add([step(n, float(n)) for n in range(1, 5)])
    outbox.sent(outbox.due(everything=False)[:2])
    assert [record.step for record in outbox.due(everything=False)] == [3, 4]
    assert outbox.delivered == {TRAIN: 2}
