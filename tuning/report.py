"""What a study has shown, in Markdown, and its place in a file of such sections."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from pipelines.errors import UserError
from pipelines.run_folder import write_whole
from tuning.measure_names import DESCRIPTIONS
from tuning.results import Results
from tuning.statistics import Interval, interval
from tuning.study_config import StudyConfig
from tuning.verdict import ClaimVerdict

_HEAD = """\
# Findings

Each section is a study that `steadymoe study NAME` runs, written as it came out.
"""
# With a grid, so many of the shown measures are told value by value.
_WHOLE = 2
# More or less of these is neither good nor bad.
_WITHOUT_BEST = {"clip_rate"}
_HOW_TO_READ = """\
How to read it: a block is one seed through every arm{grid}, on the same data and from the same starting weights, so
that arms are compared seed by seed. Cells are the mean over seeds ± half the width of its 95 % t-interval; one is bold
if its interval lies below all others of its column, and – if an arm has no such measure, or a run of it diverged before
it was measured. A claim **holds** if the differences within seeds are as it says, beyond their noise; it **does not
hold** if they are otherwise, beyond their noise; in between, one **cannot tell**. **Not exercised**: what the claim is
about did not act, so that nothing follows."""
_LINE_LENGTH = 120


@dataclass(frozen=True)
class Effort:
    """What a study took."""

    minutes: float
    steps: int
    """Optimizer steps of a trial whose arm has no duration of its own (``as_long_as``)."""
    tokens: int
    """Training tokens of such a trial."""
    hardware: str
    """In words."""


def write_report(
    config: StudyConfig, results: Results, verdicts: Sequence[ClaimVerdict], effort: Effort, picture: str
) -> str:
    """The section of one study; ``picture`` is the link to its picture, relative to the file of the section."""
    parts = [
        f"## {_one_line(config.title)}",
        config.question.strip(),
        _what_was_run(config, results, effort),
        config.notes.strip(),
        f"![{_one_line(config.title)}](<{picture}>)",
        _verdict_table(verdicts),
        *_arm_tables(config, results),
        _measures(config),
        fill(_HOW_TO_READ.format(grid=" and every value of the grid" if config.grid else ""), _LINE_LENGTH),
        _what_was_not_shown(config, results, verdicts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def replace_section(file: Path, name: str, text: str) -> None:
    """Put a study's section into a Markdown file, between ``<!-- study NAME -->`` and ``<!-- end NAME -->``.

    A section that is there is replaced, one that is not is appended, and a file that is missing is made with a short
    head. All else in the file stays as it is, byte for byte.

    Raises:
        UserError: the file is not UTF-8, or has one of the two marks without the other, twice, or in the wrong order.
    """
    try:
        before = file.read_bytes().decode() if file.exists() else _HEAD
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text") from error
    begin, end = f"<!-- study {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    # Marks have a line of their own: a sentence may speak of them.
    begins, ends = (list(re.finditer(rf"^{re.escape(mark)}(?=\s*$)", before, re.MULTILINE)) for mark in (begin, end))
    if not begins and not ends:
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        write_whole(file, f"{before}{gap}{section}\n")
        return
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise UserError(f"{file}: should have one line {begin} and below it one line {end}, or neither")
    write_whole(file, before[: begins[0].start()] + section + before[ends[0].end() :])


def plus_minus(over_seeds: Interval) -> str:
    """Mean ± half-width, both to the second significant digit of the half-width; the mean alone of one seed."""
    mean, half = over_seeds.mean, (over_seeds.high - over_seeds.low) / 2
    if not math.isfinite(half):
        return _plain(mean)
    if half <= 1e-9 * abs(mean):
        return f"{_plain(mean)} ± 0"
    digits = 1 - int(f"{half:.1e}".split("e")[1])
    if digits > 6:
        return f"{mean:.4g} ± {half:.2g}"
    return " ± ".join(_to_digits(value, digits) for value in (mean, half))


def _to_digits(value: float, digits: int) -> str:
    # Adding zero takes the sign off a zero.
    return f"{round(value, digits) + 0.0:,.{max(digits, 0)}f}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _what_was_run(config: StudyConfig, results: Results, effort: Effort) -> str:
    seeds, arms, points = len(results.seeds), len(config.arms), len(config.points())
    lines = [f"- Blocks: {seeds} of {config.blocks}, in {effort.minutes:,.1f} minutes"]
    factors = [_counted(seeds, "seed"), f"{arms} arms"]
    if config.grid:
        factors.append(f"{points} values of the grid")
        lines.append(f"- Grid: `{config.grid.key}` at {', '.join(f'{value:g}' for value in config.grid.values)}")
    timed = ((name, arm.as_long_as.arm) for name, arm in config.arms.items() if arm.as_long_as is not None)
    lines += [
        f"- Trials: {seeds * arms * points} ({' × '.join(factors)}),"
        f" each of {effort.steps:,} steps and {effort.tokens:,} tokens"
        + "".join(f"; `{name}` takes as long as `{other}`" for name, other in timed),
        f"- Model: preset {' + '.join(f'`{preset}`' for preset in config.base)}"
        + (" in the study's own sizes" if "model" in config.config else ""),
        f"- Hardware: {_one_line(effort.hardware)}",
        "- Arms:",
        *(f"  - `{name}`: {_one_line(arm.says)}" for name, arm in config.arms.items()),
    ]
    return "\n".join(lines)


def _verdict_table(verdicts: Sequence[ClaimVerdict]) -> str:
    rows = []
    for verdict in verdicts:
        told = [condition.sentence for condition in verdict.conditions]
        if len(told) > 1:
            told = [f"{condition.verdict}: {condition.sentence}" for condition in verdict.conditions]
        lines = [f"{verdict.claim.name}: {verdict.claim.says}", *told, verdict.reason]
        rows.append(["<br>".join(line for line in lines if line), f"**{verdict.verdict}**"])
    return markdown_table(["claim, and what was seen", "verdict"], rows)


def _arm_tables(config: StudyConfig, results: Results) -> list[str]:
    """One table of all shown measures; with a grid, one for each of the first, and one of the means of the others."""
    if config.grid is None:
        columns = [(f"`{measure}`", measure, config.points()) for measure in config.shown]
        return [_arm_table(config, results, columns)]
    key, tables = config.grid.key, []
    for measure in config.shown[:_WHOLE]:
        columns = [(f"{point:g}", measure, [point]) for point in config.points()]
        tables += [f"`{measure}` by `{key}`:", _arm_table(config, results, columns)]
    if others := config.shown[_WHOLE:]:
        columns = [(f"`{measure}`", measure, config.points()) for measure in others]
        tables += [f"Means over the values of `{key}`:", _arm_table(config, results, columns)]
    return tables


def _arm_table(
    config: StudyConfig, results: Results, columns: Iterable[tuple[str, str, Sequence[float | None]]]
) -> str:
    """A row for each arm; a column is its heading, the measure, and the points of the grid that it is the mean over."""
    headings, rows = ["arm"], [[f"`{name}`"] for name in config.arms]
    for heading, measure, points in columns:
        headings.append(heading)
        for row, cell in zip(rows, _column(results, measure, list(config.arms), points), strict=True):
            row.append(cell)
    return markdown_table(headings, rows)


def _column(results: Results, measure: str, arms: Sequence[str], points: Sequence[float | None]) -> list[str]:
    found = {arm: values for arm in arms if (values := results.values(measure, arm, points))}
    cells = {arm: interval(values) for arm, values in found.items()}
    texts = {arm: plus_minus(cell) for arm, cell in cells.items()}
    if len(cells) > 1 and measure not in _WITHOUT_BEST:
        best = min(cells, key=lambda arm: cells[arm].high)
        if all(cells[best].high < other.low for arm, other in cells.items() if arm != best):
            texts[best] = f"**{texts[best]}**"
    return [texts.get(arm, "–") for arm in arms]


def _measures(config: StudyConfig) -> str:
    return "\n".join(f"- `{measure}`: {DESCRIPTIONS[measure]}" for measure in config.shown)


def _what_was_not_shown(config: StudyConfig, results: Results, verdicts: Sequence[ClaimVerdict]) -> str:
    number, wanted = len(results.seeds), config.blocks
    blocks = _counted(number, "block")
    resolved = f"{blocks}: differences smaller than the interval are not resolved."
    lines = [resolved if number > 1 else f"{blocks}: there is no interval, and no difference is resolved."]
    if number < wanted:
        lines.append(f"{wanted - number} of the {wanted} blocks that were wanted were not run.")
    for verdict in ("cannot tell", "not exercised"):
        if names := [each.claim.name for each in verdicts if each.verdict == verdict]:
            lines.append(f"{verdict.capitalize()}: {', '.join(names)}.")
    return "\n".join(["What was not shown:", "", *(f"- {line}" for line in lines)])


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; line ends and bars in its cells are taken care of."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
