"""The page and its figures: whole, offline, finite, and with the diverged runs in them."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from tests.tuning.comparison.made import Made, folders, lr, many
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.curves import layer_figure, loss_figure
from tuning.comparison.over_keys import parallel_figure, sensitivity_figure
from tuning.comparison.page import describe, to_html, to_markdown, write_report
from tuning.comparison.trade_off import front, trade_off_figure


def compared(*made: Made) -> Comparison:
    return compare_runs(folders(*made), "a <test> & more")


def motley() -> Comparison:
    """Seeds, a diverged run, spikes, layers of some, a run cut short, another key with words."""
    return compared(
        *many((*lr("1e-3"), "stability.clip.kind=none"), [3.0, 3.1], "low", layers=2),
        *many((*lr("3e-3"), "stability.clip.kind=zclip"), [2.8, 2.95], "mid", spikes=(6, 12), max_vio=0.9),
        Made("lost", (*lr("1.0"), "stability.clip.kind=none"), lost_at=8, spikes=(3,), layers=2),
        Made("cut", (*lr("3e-2"), "stability.clip.kind=none"), done=8),
    )


class Parsed(HTMLParser):
    """Text, scripts and ids of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str | None] = []
        self.plots = 0
        self._tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("script", "link", "img"):
            self.sources += [found[name] for name in ("src", "href") if name in found]
        self.plots += "plotly-graph-div" in (found.get("class") or "")
        self._tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._tags and self._tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._tags):
            self.words.append(data)


def traces(figure: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = figure.to_dict()["data"]
    return found


def test_the_page_opens_offline_and_plotly_is_in_it_once() -> None:
    html = to_html(motley())
    page = Parsed(html)
    assert page.sources == []
    assert page.plots == 5
    # The first words of its licence.
    assert html.count("plotly.js v") == 1
    assert not re.search(r"<script[^>]+src=", html)


def test_no_number_on_the_page_is_nan_or_infinite() -> None:
    found = motley()
    words = " ".join(Parsed(to_html(found)).words)
    assert "lost" in words
    for text in (words, to_markdown(found), describe(found)):
        assert not re.search(r"\b(nan|inf|infinity)\b", text, re.IGNORECASE)


def test_what_the_page_says() -> None:
    words = " ".join(" ".join(Parsed(to_html(motley())).words).split())
    for wanted in (
        "a <test> & more",
        "6 runs of 4 configurations, 1 diverged",
        "diverged: train/loss not finite at step 8",
        "What is not comparable",
        "Seeds are unequal: seeds 0, 1 in #1, #2; seed 0 in #3, #4.",
        "1 run was not trained to its end and is in no mean of the end: cut (ended at step 8 of 20).",
        "Too few to tell: 3 configurations have an outcome",
    ):
        assert wanted in words


def test_a_name_cannot_put_anything_into_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    html = to_html(compared(Made("a", (f"data.corpus.paths=['{evil}']",), dataset=None), Made("b", dataset=None)))
    assert "<script>alert(1)" not in html


def test_the_loss_figure_has_every_run_and_its_spikes() -> None:
    found = motley()
    drawn = traces(loss_figure(found))
    names = [trace["name"] for trace in drawn if trace.get("showlegend")]
    assert names == [each.name for each in found.configurations]
    spikes = [trace for trace in drawn if trace.get("marker", {}).get("symbol") == "triangle-up"]
    assert sorted(len(trace["x"]) for trace in spikes) == [1, 2, 2]
    assert "step 6: loss spike, 9.125 where 3.25 was to be expected" in spikes[0]["text"][0]
    assert "training went back to step 0" in spikes[0]["text"][0]
    dotted = [trace for trace in drawn if trace.get("line", {}).get("dash") == "dot"]
    assert all(trace["hovertemplate"].count("lost") for trace in dotted)
    assert dotted


def test_curves_are_over_tokens() -> None:
    found = motley()
    ends = {max(trace["x"]) for trace in traces(loss_figure(found)) if trace["mode"] == "lines"}
    assert ends == {20 * 512, 8 * 512, 7 * 512}


def test_diverged_runs_are_at_the_top_of_the_sensitivity_figure() -> None:
    figure = sensitivity_figure(motley(), "optimizer.lr")
    crosses = [trace for trace in traces(figure) if trace["marker"].get("symbol") == "x"]
    assert [list(trace["x"]) for trace in crosses] == [[1.0]]
    means = [value for trace in traces(figure) if trace["mode"] == "lines+markers" for value in trace["y"]]
    assert min(crosses[0]["y"]) > max(means)
    assert figure.layout.xaxis.type == "log"
    assert "1 of 1 runs" in [annotation.text for annotation in figure.layout.annotations]


def test_the_lines_of_the_sensitivity_figure_differ_in_this_key_alone() -> None:
    drawn = {
        trace["name"]: (list(trace["x"]), list(trace["y"]))
        for trace in traces(sensitivity_figure(motley(), "optimizer.lr"))
        if trace["mode"] == "lines+markers"
    }
    assert drawn == {"clip none": ([0.001], [pytest.approx(3.05)]), "clip zclip": ([0.003], [pytest.approx(2.875)])}


def test_every_run_is_in_the_parallel_coordinates_and_the_diverged_one_above_them() -> None:
    found = motley()
    drawn = {re.findall(r"#\d (\S+)</b>", trace["hovertemplate"])[0]: trace for trace in traces(parallel_figure(found))}
    assert drawn.keys() == {run.info.name for run in found.runs}
    last = {name: trace["y"][-1] for name, trace in drawn.items()}
    assert max(last, key=lambda name: last[name]) == "lost"
    assert last["mid-s0"] == 0.0
    assert last["low-s1"] == 1.0


def test_layers_are_drawn_of_the_runs_that_recorded_them() -> None:
    figure, words = layer_figure(motley())
    assert figure is not None
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [
        "Least validation loss: #2 low-s0",
        "Greatest validation loss: #2 low-s1",
        "Diverged: train/loss not finite at step 8: #4 lost",
    ]
    first = traces(figure)[0]
    assert list(first["y"]) == ["layer 00", "layer 01"]
    assert [row[0] for row in first["z"]] == [2.0, 3.0]
    assert words.endswith("3 of 6 runs have no record by layer.")
    none, said = layer_figure(compared(Made("a"), Made("b", seed=1)))
    assert none is None
    assert "tracking.per_layer=true does" in said


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert front([(2.0, 1.0), (1.0, 2.0), (2.0, 2.0), (3.0, 1.0), (0.5, 3.0)]) == [(0.5, 3.0), (1.0, 2.0), (2.0, 1.0)]


def test_a_diverged_configuration_is_drawn_but_on_no_front() -> None:
    figure = trade_off_figure(motley())
    assert figure is not None
    crosses = [trace for trace in traces(figure) if trace.get("marker", {}).get("symbol") == "x"]
    assert len(crosses) == 3
    fronts = [list(zip(trace["x"], trace["y"], strict=True)) for trace in traces(figure) if trace["mode"] == "lines"]
    assert fronts[0] == [(0.0, pytest.approx(3.05)), (2.0, pytest.approx(2.875))]


def test_without_a_difference_in_stability_there_is_no_front() -> None:
    assert trade_off_figure(compared(Made("a", lr("1e-3")), Made("b", lr("3e-3")))) is None


def test_runs_of_one_configuration_make_a_page() -> None:
    html = to_html(compared(Made("a", seed=0), Made("b", seed=1)))
    assert Parsed(html).plots == 1


def test_a_dense_model_has_no_max_vio_and_a_page() -> None:
    found = compared(*[Made(f"m{n}", (f"optimizer.lr={n + 1}e-3",), max_vio=None) for n in range(2)])
    assert found.configurations[0].max_vio is None
    assert "| – | 0 | 0 | 0 |" in to_markdown(found)


def test_report_and_page_are_written_side_by_side(tmp_path: Path) -> None:
    found = motley()
    path = write_report(found, tmp_path / "figures" / "compare.html")
    assert path.read_text().startswith("<!doctype html>")
    assert (tmp_path / "figures" / "report.md").read_text() == to_markdown(found)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(found, tmp_path / "file" / "compare.html")
