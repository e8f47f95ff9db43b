"""How the picture of a study is laid out: panels, what is written around them, and where."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Self

from pipelines.plotting import WIDTH
from tuning.measure_names import DESCRIPTIONS
from tuning.study_config import StudyConfig
from tuning.verdict import ClaimVerdict

PANELS = 6
"""Without a grid, so many of the shown measures are drawn."""

# Inches that a character and a line of the text take; on the wide side.
_CHARACTER, _LINE = 0.07, 0.19
_TITLE_LINE = 0.22
_NAME_LENGTH = 26
_HEAD_LENGTH, _FOOT_LENGTH = 95, 125
_NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class SheetText:
    """Lines beside the left edge; ``y`` as a share of the height."""

    content: str
    y: float
    style: dict[str, Any]


@dataclass(frozen=True)
class StudySheet:
    """The layout, in inches from the bottom unless said otherwise."""

    measures: list[str]
    titles: list[str]
    """Of the panels, broken into lines."""
    row_names: list[str]
    """Names of the arms, broken into lines."""
    head: list[str]
    foot: list[str]
    columns: int
    legend_columns: int
    legend_rows: int
    panel_height: float

    @classmethod
    def of(cls, config: StudyConfig, verdicts: Sequence[ClaimVerdict]) -> Self:
        """The sheet of a study."""
        measures: list[str] = list(config.shown if config.grid else config.shown[:PANELS])
        # Four read better as two by two.
        columns = len(measures) if len(measures) < 3 else 2 if len(measures) == 4 else 3
        names = [wrap(name, _NAME_LENGTH) for name in config.arms]
        widest_name = max(len(line) for name in names for line in name)
        beside = 0.7 * columns if config.grid else _CHARACTER * widest_name + 0.3 * columns
        title_length = int((WIDTH - beside) / columns / _CHARACTER)
        titles = [wrap(f"{name}: {DESCRIPTIONS[name]}", title_length) for name in measures]
        legend_columns = max(1, min(len(names), int(WIDTH / (0.7 + _CHARACTER * max(map(len, config.arms))))))
        body = 2.3 if config.grid else max(0.9, sum(0.17 + 0.15 * len(name) for name in names))
        return cls(
            measures=measures,
            titles=["\n".join(lines) for lines in titles],
            row_names=["\n".join(lines) for lines in names],
            head=wrap(config.title, _HEAD_LENGTH),
            foot=_verdict_lines(verdicts),
            columns=columns,
            legend_columns=legend_columns,
            legend_rows=math.ceil(len(names) / legend_columns) if config.grid else 0,
            panel_height=body + (0.6 if config.grid else 0.35) + _LINE * max(map(len, titles)),
        )

    @property
    def rows(self) -> int:
        """Of panels."""
        return math.ceil(len(self.measures) / self.columns)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        return WIDTH, self.rows * self.panel_height + self._above + self._below

    @property
    def panel_area(self) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of what the panels fill, as shares of the sheet."""
        height = self.size[1]
        return 0.0, self._below / height, 1.0, 1 - (self._above + self._below) / height

    @property
    def legend_top(self) -> float:
        """As a share of the height."""
        return (self._below - 0.02) / self.size[1]

    def texts(self, caption: str) -> list[SheetText]:
        """Title, caption and verdicts."""
        height = self.size[1]
        return [
            SheetText("\n".join(self.head), 1 - 0.1 / height, {"va": "top", "fontsize": 11, "fontweight": "bold"}),
            SheetText(caption, 1 - (self._above - 0.08) / height, {"va": "bottom", "fontsize": 8.5, "alpha": 0.8}),
            SheetText("\n".join(self.foot), 0.1 / height, {"va": "bottom", "fontsize": 9.5}),
        ]

    @property
    def _above(self) -> float:
        return 0.36 + _TITLE_LINE * len(self.head)

    @property
    def _below(self) -> float:
        return 0.2 + _LINE * (len(self.foot) + 1.08 * self.legend_rows)


def _verdict_lines(verdicts: Sequence[ClaimVerdict]) -> list[str]:
    """``T2a holds · T2b cannot tell``, broken between claims."""
    parts = (f"{verdict.claim.name} {verdict.verdict}".replace(" ", _NO_BREAK) for verdict in verdicts)
    return [line.replace(_NO_BREAK, " ") for line in wrap(" · ".join(parts), _FOOT_LENGTH)]
