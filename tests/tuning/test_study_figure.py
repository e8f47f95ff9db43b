import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tests.tuning.shown_study import RATES, Measured, results, study, verdict
from tuning.results import TrialKey
from tuning.study_figure import draw_study, study_figure

TEN_ARMS = [
    *("none", "global", "zclip", "adagc", "spam", "stable_spam", "group", "$5 to $6"),
    "a global clip at the rate of zclip",
    "very_long_name_of_an_arm_without_any_space",
]
SIX = ["val_loss", "grad_spikes", "max_vio_global", "clip_rate", "dead_experts", "steps_to_balance"]


def spread_out(key: TrialKey) -> dict[str, float]:
    """Some measures apart, some over decades, one the same everywhere; the second arm lacks one and may diverge."""
    place = TEN_ARMS.index(key.arm)
    lost = key.arm == "global" and key.seed % 2 == 0
    measured = {
        "val_loss": 5.5 if lost else 3 + place / 10 + key.seed / 50,
        "diverged": float(lost),
        "grad_spikes": place * 0.1,
        "max_vio_global": 0.01 * 2**place * (1 + key.seed / 10),
        "clip_rate": 0.1 + key.seed / 100,
        "dead_experts": 0.0,
        "steps_to_balance": 100.0 * (1 + place) + key.seed,
    }
    if key.arm == "global":
        del measured["clip_rate"]
    return measured


def drawn(arms: list[str], shown: list[str], seeds: int, measured: Measured = spread_out, grid: bool = False) -> Figure:
    config = study(arms, shown, grid)
    return study_figure(
        config, results(config, seeds, measured), [verdict("T2a", "holds"), verdict("T2b", "cannot tell")]
    )


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    return [" ".join(text.get_text().split()) for text in found]


def marks(axes: Axes, color: str) -> list[Line2D]:
    return [line for line in axes.lines if to_hex(str(line.get_color())) == color]


@pytest.mark.parametrize(("grid", "seeds"), [(False, 1), (False, 2), (True, 5)])
def test_a_picture_is_1600_pixels_wide(tmp_path: Path, grid: bool, seeds: int) -> None:
    config = study(TEN_ARMS, SIX, grid)
    path = tmp_path / "figures" / "study.png"
    draw_study(config, results(config, seeds, spread_out), [verdict("T1", "holds")], path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1600
    assert 800 < height < 2400


@pytest.mark.parametrize(("grid", "number"), [*((False, number) for number in range(1, 7)), (True, 1), (True, 6)])
def test_each_shown_measure_has_a_panel_that_names_it(grid: bool, number: int) -> None:
    figure = drawn(TEN_ARMS[:3], SIX[:number], 3, grid=grid)
    titles = [axes.get_title(loc="left").split(":")[0] for axes in figure.axes]
    assert titles == SIX[:number]


def test_the_seventh_measure_is_drawn_only_over_a_grid() -> None:
    seven = [*SIX, "diverged"]
    assert len(drawn(TEN_ARMS[:2], seven, 2).axes) == 6
    assert len(drawn(TEN_ARMS[:2], seven, 2, grid=True).axes) == 7


@pytest.mark.parametrize("grid", [False, True])
def test_title_verdicts_and_the_name_of_every_arm_are_written(grid: bool) -> None:
    written = texts(drawn(TEN_ARMS, SIX, 3, grid=grid))
    assert "Does it help?" in written
    assert "T2a holds · T2b cannot tell" in written
    # A name without spaces is broken where the line ends.
    together = [text.replace(" ", "") for text in written]
    for arm in TEN_ARMS:
        assert arm.replace(" ", "") in together


@pytest.mark.parametrize("grid", [False, True])
def test_no_two_arms_look_alike(grid: bool) -> None:
    axes = drawn(TEN_ARMS, ["max_vio_global"], 3, grid=grid).axes[0]
    bold = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_markeredgecolor() == "white"}
    assert len(bold) == len(TEN_ARMS)
    # Each of the two tells them apart for who cannot see the other; of the marks one comes back.
    assert len({color for color, _ in bold}) == len(TEN_ARMS)
    assert len({marker for _, marker in bold}) == len(TEN_ARMS) - 1


def test_a_row_shows_seeds_mean_and_interval() -> None:
    losses = {"a": [3.0, 3.1, 3.5], "b": [4.0, 4.0, 4.0]}
    axes = drawn(["a", "b"], ["val_loss"], 3, lambda key: {"val_loss": losses[key.arm][key.seed]}).axes[0]
    first = marks(axes, to_hex(str(axes.lines[0].get_color())))
    seeds = [value for line in first if line.get_alpha() for value in list(line.get_xdata())]  # type: ignore[arg-type]
    bar, mean = [list(line.get_xdata()) for line in first if not line.get_alpha()]  # type: ignore[arg-type]
    assert seeds == losses["a"]
    assert mean == [pytest.approx(3.2)]
    # t of two degrees of freedom, 4.3027, times the standard error: sqrt(0.07 / 3).
    assert bar == pytest.approx([3.2 - 0.65724, 3.2 + 0.65724], abs=1e-4)


def test_rows_are_in_the_order_of_the_config() -> None:
    axes = drawn(["spam", "none", "zclip"], ["val_loss"], 2).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["spam", "none", "zclip"]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_a_line_shows_the_means_over_the_grid() -> None:
    def measured(key: TrialKey) -> dict[str, float]:
        assert key.point is not None
        return {"val_loss": 100 * key.point + key.seed + (key.arm == "b")}

    axes = drawn(["a", "b"], ["val_loss"], 3, measured, grid=True).axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [RATES, RATES]  # type: ignore[arg-type]
    assert list(lines[1].get_ydata()) == pytest.approx([100 * rate + 2 for rate in RATES])  # type: ignore[arg-type]
    assert len(axes.collections) == 2
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "optimizer.lr"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-3", "3e-3", "0.01"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.1, 1.01], "log"), ([0.1, 0.99], "linear"), ([0.0, 100.0], "linear"), ([-1.0, 100.0], "linear")],
)
def test_an_axis_is_logarithmic_over_more_than_a_decade(values: list[float], scale: str) -> None:
    axes = drawn(["a", "b"], ["val_loss"], 1, lambda key: {"val_loss": values["ab".index(key.arm)]}).axes[0]
    assert axes.get_xscale() == scale


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.25, 1e-9])
def test_what_is_the_same_everywhere_has_one_number_in_the_middle(grid: bool, value: float) -> None:
    axes = drawn(["a", "b"], ["val_loss"], 3, lambda _: {"val_loss": value}, grid).axes[0]
    ticks, ends = (axes.get_yticks(), axes.get_ylim()) if grid else (axes.get_xticks(), axes.get_xlim())
    assert list(ticks) == [value]
    assert sum(ends) / 2 == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_two_seeds_do_not_push_all_others_out_of_sight(scale: float) -> None:
    values = {"a": [1.0, 2.0 * scale], "b": [1.5, 1.6]}
    axes = drawn(["a", "b"], ["val_loss"], 2, lambda key: {"val_loss": values[key.arm][key.seed]}).axes[0]
    low, high = axes.transData.transform([(1.0, 0), (2.0 * scale, 0)])[:, 0]
    left, right = axes.transAxes.transform([(0, 0), (1, 0)])[:, 0]
    assert left < low < high < right
    assert (high - low) / (right - left) > 0.4


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("seeds", [1, 3])
def test_runs_that_diverged_are_crosses(grid: bool, seeds: int) -> None:
    figure = drawn(["none", "global"], ["val_loss"], seeds, grid=grid)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    lost = 1 if seeds == 1 else 2
    assert len(crosses) == lost * (len(RATES) if grid else 1)
    assert any("×: diverged" in text for text in texts(figure))
    assert not any("×" in text for text in texts(drawn(["none", "zclip"], ["val_loss"], seeds, grid=grid)))


@pytest.mark.parametrize("grid", [False, True])
def test_what_was_not_recorded_is_said(grid: bool) -> None:
    assert "not recorded" in texts(drawn(["none", "zclip"], ["train_loss"], 3, grid=grid))
    assert "not recorded" in texts(drawn(["none", "zclip"], ["val_loss"], 0, grid=grid))


def test_the_row_of_an_arm_without_the_measure_says_so() -> None:
    assert texts(drawn(["none", "global", "zclip"], ["clip_rate"], 3)).count("not recorded") == 1


@pytest.mark.parametrize(("grid", "number"), [*((False, number) for number in (1, 2, 3, 4, 6)), (True, 1), (True, 6)])
def test_nothing_that_is_written_overlaps_or_leaves_the_sheet(grid: bool, number: int) -> None:
    figure = drawn(TEN_ARMS, SIX[:number], 3, grid=grid)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in seen(figure) if text.get_text()]
    for name, box in boxes:
        assert Bbox.union([box, figure.bbox.padded(1)]).size == pytest.approx(figure.bbox.padded(1).size), name
    for index, (name, box) in enumerate(boxes):
        for other, its_box in boxes[index + 1 :]:
            shared = Bbox.intersection(box, its_box)
            assert shared is None or min(shared.width, shared.height) < 2, (name, other)


def seen(figure: Figure) -> Iterator[Text]:
    """All text but the numbers that matplotlib keeps beyond the ends of an axis."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (child for child in axes.get_children() if isinstance(child, Text))
        for axis in (axes.xaxis, axes.yaxis):
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if low <= tick.get_loc() <= high and tick.label1.get_visible():
                    yield tick.label1
