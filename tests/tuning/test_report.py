import math
from pathlib import Path

import pytest

from pipelines.errors import UserError
from tests.tuning.shown_study import RATES, Measured, results, study, verdict
from tuning.measure_names import DESCRIPTIONS
from tuning.report import Effort, plus_minus, replace_section, write_report
from tuning.results import TrialKey
from tuning.statistics import Interval
from tuning.study_config import Duration, StudyConfig
from tuning.verdict import ClaimVerdict

EFFORT = Effort(minutes=12.34, steps=1500, tokens=1_536_000, hardware="2 cores")


def report(config: StudyConfig, seeds: int, measured: Measured, *verdicts: ClaimVerdict) -> str:
    return write_report(config, results(config, seeds, measured), verdicts, EFFORT, "figures/x.png")


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each table, without the line under its headings."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.replace("\\|", "&").strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[row for row in table if set("".join(row)) != {"-"}] for table in found if table]


def by_arm(**losses: list[float]) -> Measured:
    return lambda key: {"val_loss": losses[key.arm][key.seed]}


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (3.41234, 0.01234, "3.412 ± 0.012"),
        (3.41, 0.0996, "3.41 ± 0.10"),
        (5.0, 1.26, "5.0 ± 1.3"),
        (1234.0, 157.0, "1,230 ± 160"),
        (87_654.0, 3_210.0, "87,700 ± 3,200"),
        (-0.0004, 0.12, "0.00 ± 0.12"),
        (0.0, 0.0, "0 ± 0"),
        (3.2, 0.0, "3.2 ± 0"),
        (1 / 3, 1e-16, "0.3333 ± 0"),
        (0.0000021, 0.00000012, "2.1e-06 ± 1.2e-07"),
        (3.14159, math.inf, "3.142"),
        (123_456.7, math.inf, "123,457"),
    ],
)
def test_figures_are_rounded_by_their_interval(mean: float, half: float, text: str) -> None:
    assert plus_minus(Interval(mean, mean - half, mean + half, 3)) == text


def test_the_section_says_what_was_run() -> None:
    config = study(["a", "b"], ["val_loss"], grid=True, notes="Read this.", base=["micro", "wide"])
    text = report(config, 3, lambda _: {"val_loss": 1.0})
    assert text.startswith("## Does it help?\n\nWhether it helps.\n\n")
    for line in (
        "- Blocks: 3 of 10, in 12.3 minutes",
        "- Grid: `optimizer.lr` at 0.001, 0.003, 0.01",
        "- Trials: 18 (3 seeds × 2 arms × 3 values of the grid), each of 1,500 steps and 1,536,000 tokens",
        "- Model: preset `micro` + `wide`",
        "- Hardware: 2 cores",
        "  - `a`: what a is",
        "  - `b`: what b is",
        "Read this.",
        "![Does it help?](<figures/x.png>)",
        f"- `val_loss`: {DESCRIPTIONS['val_loss']}",
    ):
        assert line in text.splitlines()


def test_the_section_names_the_arms_whose_length_is_that_of_another_s_time() -> None:
    config = study(["a", "b"], ["val_loss"])
    timed = config.arms["b"].model_copy(update={"as_long_as": Duration(arm="a", paced_by="a")})
    text = report(config.model_copy(update={"arms": {**config.arms, "b": timed}}), 3, lambda _: {"val_loss": 1.0})
    expected = "- Trials: 6 (3 seeds × 2 arms), each of 1,500 steps and 1,536,000 tokens; `b` takes as long as `a`"
    assert expected in text.splitlines()


def test_the_section_does_not_pass_another_model_off_as_the_preset() -> None:
    config = study(["a", "b"], ["val_loss"], config={"model": {"hidden_size": 64}})
    text = report(config, 1, lambda _: {"val_loss": 1.0})
    assert "- Model: preset `micro` in the study's own sizes" in text.splitlines()


def test_verdicts_come_before_the_arms() -> None:
    text = report(
        study(["a", "b"], ["val_loss"]),
        2,
        by_arm(a=[1, 2], b=[3, 4]),
        verdict("T1", "holds", "a is 2.0 below b | paired."),
        verdict("T2", "does not hold", "First.", "Second."),
        verdict("T3", "not exercised", reason="Nothing was clipped."),
    )
    assert tables(text)[0] == [
        ["claim, and what was seen", "verdict"],
        ["T1: the claim T1<br>a is 2.0 below b & paired.", "**holds**"],
        ["T2: the claim T2<br>does not hold: First.<br>does not hold: Second.", "**does not hold**"],
        ["T3: the claim T3<br>Nothing was clipped.", "**not exercised**"],
    ]
    assert tables(text)[1][0] == ["arm", "`val_loss`"]


def test_every_arm_has_a_row_with_its_interval() -> None:
    # Two seeds: t is 12.706, the standard error half of their distance.
    text = report(study(["a", "b"], ["val_loss"]), 2, by_arm(a=[3.0, 3.2], b=[3.5, 3.5]), verdict("T1", "holds", "s"))
    assert tables(text)[1] == [["arm", "`val_loss`"], ["`a`", "3.1 ± 1.3"], ["`b`", "3.5 ± 0"]]


def test_a_measure_that_an_arm_lacks_is_a_dash() -> None:
    config = study(["a", "b"], ["val_loss", "clip_rate"])
    text = report(config, 1, lambda key: {"val_loss": 2.5} | ({"clip_rate": 0.25} if key.arm == "b" else {}))
    assert tables(text)[-1][1:] == [["`a`", "2.5", "–"], ["`b`", "2.5", "0.25"]]


@pytest.mark.parametrize(
    ("measure", "a", "b", "marked"),
    [
        ("val_loss", [1.0, 1.001, 1.002], [2.0, 2.001, 2.002], True),
        ("val_loss", [1.0, 2.0, 3.0], [2.0, 2.001, 2.002], False),
        ("val_loss", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ("val_loss", [1.0], [2.0], False),
        # Clipping less is not better.
        ("clip_rate", [0.1, 0.1, 0.1], [0.2, 0.2, 0.2], False),
    ],
)
def test_the_best_is_marked_if_its_interval_excludes_the_others(
    measure: str, a: list[float], b: list[float], marked: bool
) -> None:
    shown: Measured = lambda key: {measure: {"a": a, "b": b}[key.arm][key.seed]}  # noqa: E731
    rows = tables(report(study(["a", "b"], [measure]), len(a), shown))[-1]
    assert [row[1].startswith("**") for row in rows[1:]] == [marked, False]


def test_a_grid_is_told_point_by_point_for_two_measures_and_in_the_mean_for_the_rest() -> None:
    def measured(key: TrialKey) -> dict[str, float]:
        assert key.point is not None
        place = RATES.index(key.point)
        offset = 10.0 if key.arm == "b" else 0.0
        return {"val_loss": place + offset, "train_loss": 2 * place + offset, "dead_experts": 3 * place + offset}

    text = report(study(["a", "b"], ["val_loss", "train_loss", "dead_experts"], grid=True), 2, measured)
    assert tables(text)[-3:] == [
        [
            ["arm", "0.001", "0.003", "0.01"],
            ["`a`", "**0 ± 0**", "**1 ± 0**", "**2 ± 0**"],
            ["`b`", "10 ± 0", "11 ± 0", "12 ± 0"],
        ],
        [
            ["arm", "0.001", "0.003", "0.01"],
            ["`a`", "**0 ± 0**", "**2 ± 0**", "**4 ± 0**"],
            ["`b`", "10 ± 0", "12 ± 0", "14 ± 0"],
        ],
        [["arm", "`dead_experts`"], ["`a`", "**3 ± 0**"], ["`b`", "13 ± 0"]],
    ]
    lines = text.splitlines()
    captions = [
        "`val_loss` by `optimizer.lr`:",
        "`train_loss` by `optimizer.lr`:",
        "Means over the values of `optimizer.lr`:",
    ]
    assert [line for line in lines if line in captions] == captions


@pytest.mark.parametrize(
    ("seeds", "most", "lines"),
    [
        (3, 3, ["- 3 blocks: differences smaller than the interval are not resolved."]),
        (
            1,
            4,
            [
                "- 1 block: there is no interval, and no difference is resolved.",
                "- 3 of the 4 blocks that were wanted were not run.",
            ],
        ),
        (
            0,
            2,
            [
                "- 0 blocks: there is no interval, and no difference is resolved.",
                "- 2 of the 2 blocks that were wanted were not run.",
            ],
        ),
    ],
)
def test_it_says_what_was_not_shown(seeds: int, most: int, lines: list[str]) -> None:
    config = study(["a", "b"], ["val_loss"], blocks=most)
    verdicts = [verdict("T1", "cannot tell"), verdict("T2", "not exercised"), verdict("T3", "holds")]
    text = report(config, seeds, lambda _: {"val_loss": 1.0}, *verdicts)
    end = text.splitlines()[text.splitlines().index("What was not shown:") + 2 :]
    assert end == [*lines, "- Cannot tell: T1.", "- Not exercised: T2."]


def test_a_missing_file_is_made_with_a_head(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "findings.md"
    replace_section(file, "clip", "## Clip\n\nText.\n")
    assert file.read_text() == (
        "# Findings\n\nEach section is a study that `steadymoe study NAME` runs, written as it came out.\n\n"
        "<!-- study clip -->\n## Clip\n\nText.\n<!-- end clip -->\n"
    )


def test_a_section_is_replaced_and_all_else_kept_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "findings.md"
    head = "\ufeff# Mine\r\n\tA line about `<!-- study clip -->` and <!-- end clip -->.  \n\n".encode()
    other = b"<!-- study clip-2 -->\nother\n<!-- end clip-2 -->\n"
    tail = b"\r\n\n" + other + b"no newline \\1 \xc3\xa9"
    file.write_bytes(head + b"<!-- study clip -->\nold\n\n<!-- end clip -->" + tail)
    replace_section(file, "clip", "new \\1\n")
    replaced = head + b"<!-- study clip -->\nnew \\1\n<!-- end clip -->" + tail
    assert file.read_bytes() == replaced
    replace_section(file, "clip", "new \\1\n")
    assert file.read_bytes() == replaced


@pytest.mark.parametrize(("before", "gap"), [("", ""), ("# Mine\n", "\n"), ("# Mine", "\n\n"), ("a\r\n", "\n")])
def test_a_new_section_is_appended(tmp_path: Path, before: str, gap: str) -> None:
    file = tmp_path / "findings.md"
    file.write_bytes(before.encode())
    for _ in range(2):
        replace_section(file, "clip", "new")
        assert file.read_bytes().decode() == f"{before}{gap}<!-- study clip -->\nnew\n<!-- end clip -->\n"


@pytest.mark.parametrize(
    "content",
    [
        b"<!-- study clip -->\n",
        b"<!-- end clip -->\n",
        b"<!-- end clip -->\n<!-- study clip -->\n",
        b"<!-- study clip -->\n<!-- end clip -->\n<!-- study clip -->\n<!-- end clip -->\n",
        b"\xff",
    ],
)
def test_a_file_with_stray_marks_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "findings.md"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"findings\.md: "):
        replace_section(file, "clip", "new")
    assert file.read_bytes() == content
