"""The report of a comparison: a page of HTML that opens offline, and the same without pictures in Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.run_folder import write_whole
from tuning.comparison.caveats import caveats, matching
from tuning.comparison.comparing import Comparison
from tuning.comparison.curves import layer_figure, loss_figure
from tuning.comparison.findings import findings, headline
from tuning.comparison.importance import importances
from tuning.comparison.over_keys import importance_figure, numeric_keys, parallel_figure, sensitivity_figure
from tuning.comparison.style import FONT
from tuning.comparison.table import Sheet, configurations_sheet, runs_sheet
from tuning.comparison.trade_off import trade_off_figure
from tuning.report import markdown_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE = "compare.html"
REPORT = "report.md"
"""Beside the page."""

_HOW_TO_READ = (
    "± is half the width of the 95 % t-interval over seeds. Differences are paired by seed: within noise means that "
    "their interval holds zero, and one seed in common cannot tell. Spikes and steps lost are means over all runs of a "
    "configuration, loss and MaxVio over those that finished; the time is that of the training steps alone."
)
_NO_CAVEAT = "Nothing: the same seeds, text, budget and size of model everywhere."


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    words: str
    figure: "Figure | None" = None


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write the page to ``path``, and ``report.md`` beside it; returns ``path``.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        write_whole(path, to_html(comparison))
        write_whole(path.with_name(REPORT), to_markdown(comparison))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def sections(comparison: Comparison) -> list[Section]:
    """The figures, each with what one should know to read it."""
    found = [
        Section(
            "Loss over training tokens",
            "A colour is a configuration, the thick lines those that all are compared with; dotted lines diverged (✕). "
            "A triangle is a spike: point at it to see what it was and what was done. The axis ends at the loss before "
            "training; double-click to see what lies above. A click in the legend hides a configuration.",
            loss_figure(comparison),
        )
    ]
    words = "Validation loss at the end: line and large marks are means over seeds, small dots are single seeds."
    if comparison.diverged:
        words += " A cross above the dotted line is a configuration with diverged runs; how many is written over it."
    found += [
        Section(f"Sensitivity to {key}", words, sensitivity_figure(comparison, key)) for key in numeric_keys(comparison)
    ]
    if comparison.keys:
        found.append(
            Section(
                "Every run from its settings to its outcome",
                "Each line is a run; diverged runs are dotted and end above the axis of the loss. Point at one to see "
                "which it is. Axes on which all runs are equal are left out.",
                parallel_figure(comparison),
            )
        )
    found += [_importance(comparison), _layers(comparison), _trade_off(comparison)]
    return found


def _importance(comparison: Comparison) -> Section:
    found = importances(comparison)
    return Section("Which keys decide", found.words, importance_figure(found) if found.keys else None)


def _layers(comparison: Comparison) -> Section:
    figure, words = layer_figure(comparison)
    return Section("MaxVio by layer: the best run and the worst", words, figure)


def _trade_off(comparison: Comparison) -> Section:
    figure = trade_off_figure(comparison)
    words = "No two configurations differ in spikes, steps lost or MaxVio, so there is nothing to trade."
    if figure is not None:
        words = (
            "Down and left is better in both. A point is a configuration; the dashed line joins those without a "
            "diverged run that nothing beats in both. Of those with a cross runs diverged; above the "
            "dotted line, all of them."
        )
    return Section("Loss against stability", words, figure)


def to_html(comparison: Comparison) -> str:
    """The page; plotly's script is in it, once."""
    parts = [
        f"<h1>{escape(comparison.title)}</h1>",
        f'<p class="lead">{escape(headline(comparison))}</p>',
        '<div class="findings"><h2>Findings</h2>',
        _list(findings(comparison), "ol"),
        "</div>",
        "<h2>Configurations</h2>",
        f"<p>{escape(matching(comparison))} {escape(_HOW_TO_READ)} Click a heading to sort.</p>",
        _table(configurations_sheet(comparison), comparison.reference.number if comparison.reference else None),
        "<h2>What is not comparable</h2>",
        _list(caveats(comparison) or [_NO_CAVEAT], "ul"),
    ]
    is_first = True
    for section in sections(comparison):
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.words)}</p>"]
        if section.figure is not None:
            parts.append(_figure(section.figure, is_first))
            is_first = False
    parts += [
        f"<details><summary>All {len(comparison.runs)} runs</summary>",
        _table(runs_sheet(comparison)),
        "</details>",
    ]
    return _PAGE.format(title=escape(comparison.title), style=_STYLE, body="\n".join(parts), script=_SORT)


def to_markdown(comparison: Comparison) -> str:
    """Headline, findings, table and caveats."""
    sheet = configurations_sheet(comparison)
    headings = [f"`{heading}`" if heading in comparison.keys else heading for heading in sheet.headings]
    parts = [
        f"# {comparison.title}",
        headline(comparison),
        "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(findings(comparison), 1)),
        matching(comparison),
        markdown_table(headings, sheet.texts),
        _HOW_TO_READ,
        "What is not comparable:\n\n" + "\n".join(f"- {each}" for each in caveats(comparison) or [_NO_CAVEAT]),
    ]
    return "\n\n".join(parts) + "\n"


def describe(comparison: Comparison) -> str:
    """For MLflow's description of a run: the headline, since lists show the first line alone, and the findings."""
    return "\n\n".join([headline(comparison), "\n".join(f"- {sentence}" for sentence in findings(comparison))])


def _figure(figure: "Figure", with_script: bool) -> str:
    from plotly.io import to_html as figure_to_html

    html: str = figure_to_html(
        figure,
        include_plotlyjs=with_script,
        full_html=False,
        config={"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg"}},
    )
    return f'<div class="figure">{html}</div>'


def _list(sentences: Iterable[str], tag: str) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<{tag}>{items}</{tag}>"


def _table(sheet: Sheet, marked: int | None = None) -> str:
    """``marked``: the number of the row, from 1, that stands out."""
    head = "".join(f"<th>{_breakable(heading)}</th>" for heading in sheet.headings)
    rows = []
    for number, row in enumerate(sheet.rows, 1):
        cells = "".join(f'<td data-order="{escape(str(cell.order))}">{escape(cell.text)}</td>' for cell in row)
        rows.append(f'<tr class="reference">{cells}</tr>' if number == marked else f"<tr>{cells}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _breakable(heading: str) -> str:
    """Dotted keys may be broken after a dot."""
    return escape(heading).replace(".", ".<wbr>").replace("_", "_<wbr>")


_STYLE = f"""
body {{ font-family: {FONT}; color: #22303c; max-width: 1320px; margin: 0 auto; padding: 24px 24px 60px;
  line-height: 1.45; background: #fff; }}
h1 {{ font-size: 26px; margin: 0 0 6px; }}
h2 {{ font-size: 19px; margin: 34px 0 6px; }}
p {{ margin: 4px 0 10px; max-width: 1000px; color: #47555f; font-size: 14px; }}
p.lead {{ font-size: 16px; color: #22303c; }}
.findings {{ background: #f2f6fa; border-left: 4px solid #2f6fb0; padding: 2px 18px 8px; margin: 18px 0; }}
.findings h2 {{ margin-top: 12px; }}
li {{ margin: 5px 0; max-width: 1100px; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; width: 100%; }}
th {{ text-align: right; padding: 6px 7px; border-bottom: 2px solid #c9d1d8; cursor: pointer; vertical-align: bottom; }}
td {{ text-align: right; padding: 4px 7px; border-bottom: 1px solid #e3e7eb; white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.reference {{ background: #eef5ee; font-weight: 600; }}
tbody tr:hover {{ background: #f5f7f9; }}
details {{ margin-top: 34px; }}
summary {{ cursor: pointer; font-size: 19px; font-weight: 600; }}
.figure {{ margin: 4px 0 12px; }}
"""
_SORT = """
for (const heading of document.querySelectorAll('th')) heading.addEventListener('click', () => {
  const place = heading.cellIndex, body = heading.closest('table').tBodies[0];
  const rising = heading.dataset.rising !== 'yes';
  heading.dataset.rising = rising ? 'yes' : 'no';
  const order = row => { const text = row.cells[place].dataset.order; return isNaN(text) ? text : Number(text); };
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [order(a), order(b)];
    return typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === 'number' ? -1 : 1;
  });
  body.append(...(rising ? rows : rows.reverse()));
});
"""
# The encoding is said first: a page opened from a disk has no server to say it.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
<script>{script}</script>
</body></html>
"""
