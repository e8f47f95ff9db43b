"""What is not comparable is said, and nothing is said where all is alike."""

import pytest

from pipelines.run_folder import write_json
from tests.tuning.comparison.made import Made, folders, lr, many
from tuning.comparison.caveats import caveats, matching
from tuning.comparison.comparing import Comparison, compare_runs

LIKE = (*many(lr("1e-3"), [3.0, 3.1], "a"), *many(lr("3e-3"), [2.9, 3.0], "b"))


def compared(*made: Made) -> Comparison:
    return compare_runs(folders(*made), "a test")


def test_where_all_is_alike_there_is_nothing_to_say() -> None:
    assert caveats(compared(*LIKE)) == []


@pytest.mark.parametrize(
    ("further", "sentence"),
    [
        (
            Made("c", lr("1e-2"), dataset="f" * 64),
            "The text differs, so that losses are of different things: 01234567 (a-s0, a-s1, b-s0, b-s1); ffffffff (",
        ),
        (Made("c", lr("1e-2"), dataset=None), "The text differs, so that losses are of different things: 01234567 ("),
        (
            Made("c", ("validation.max_tokens=4096",)),
            "Validation losses are not of the same thing, for validation.max_tokens differ.",
        ),
        (
            Made("c", lr("1e-2"), parameters=1e6),
            "Models differ in their number of parameters: 75.0 k, 37.5 k active (a-s0, a-s1, b-s0, b-s1); 1.0 M, 500 k",
        ),
        (
            Made("c", ("schedule.steps=40",)),
            "Budgets differ: 10.2 k tokens in 20 steps (a-s0, a-s1, b-s0, b-s1); 20.5 k tokens in 40 steps (c). Losses",
        ),
        (
            Made("c", lr("1e-2"), done=7),
            "1 run was not trained to its end and is in no mean of the end: c (ended at step 7 of 20).",
        ),
        (
            Made("c", lr("1e-2"), seed=1),
            "Seeds are unequal: seeds 0, 1 in #1, #3; seed 1 in #2. Differences are of the seeds that both have.",
        ),
        (Made("c", lr("1e-3"), seed=1), "Some seed was run several times in #2; its runs count as one."),
        (
            Made("c", lr("1.0"), lost_at=6),
            "1 run diverged: in no mean, ranked last, and drawn at the edge: c (train/loss not finite at step 6).",
        ),
        (
            Made("c", ("schedule.steps=28", "validation.every_steps=7")),
            "Not validated just there, so taken along a line between two validations: c.",
        ),
        (
            Made("c", ("schedule.steps=43", "validation.every_steps=43")),
            "Not validated by then, and so in no mean: c.",
        ),
    ],
)
def test_what_differs_is_said(further: Made, sentence: str) -> None:
    found = caveats(compared(*LIKE, further))
    assert any(each.startswith(sentence) for each in found), found


def test_one_seed_each_is_no_evidence() -> None:
    found = caveats(compared(Made("a", lr("1e-3")), Made("b", lr("3e-3"))))
    assert found == ["Each configuration has one seed (0): no difference can be told from noise."]


def test_an_unknown_text_is_called_unknown() -> None:
    found = caveats(compared(Made("a", lr("1e-3"), dataset=None), Made("b", lr("3e-3"), dataset=None)))
    assert found[0] == "Whether all read the same text is not recorded: a, b."


def test_machines_that_differ_make_times_incomparable() -> None:
    made = folders(*LIKE)
    for number, folder in enumerate(made):
        write_json(folder.environment, {"cpu": "a cpu", "cores": 2 + number // 3, "packages": {"torch": "2.13.0"}})
    assert caveats(compare_runs(made, "a test")) == [
        "Machines or versions differ, so times do: a cpu, 2 cores, torch 2.13.0 (a-s0, a-s1, b-s0); a cpu, 3 cores, "
        "torch 2.13.0 (b-s1)."
    ]


def test_many_comparisons_are_warned_of() -> None:
    found = caveats(
        compared(*[each for n in range(7) for each in many(lr(f"{n + 1}e-3"), [3.0 + n / 5, 3.1 + n / 5], f"c{n}")])
    )
    assert "one in twenty is beyond noise by chance alone" in found[-1]


def test_where_values_are_compared_is_said() -> None:
    assert matching(compared(*LIKE)) == (
        "Losses, MaxVio, spikes and steps lost are those after 10,240 training tokens (10.2 k), the most that every "
        "finished run has validated after."
    )
