"""How good the spike detector is: false alarms on undisturbed runs, and which events of known size it sees.

    python -m tests.benchmarks.detector FILE [PICTURE]

FILE is one of tests/traces, made by tests.benchmarks.clean_traces; the limits were chosen by tune.npz alone. Events are
laid into its series at places that are drawn at random, one at a time: the value there is replaced, so that its own
noise is no part of the height. Heights are over what was to be seen there, a centred median of 21 values, in units of
the scatter there: 1.4826 times the median absolute deviation from that median, within 100 steps; both know the future
and nothing of the detector. The unit is itself an estimate: of 201 normal values its standard error is 8 %. So two rows
are measured again in Qn of the same values (Rousseeuw and Croux 1993, JASA 88, 1273), whose error is 5.5 %. Gradient
norms are in logarithms. The rule that is compared is that of public trainers: above the mean of the last 128 values by
6 of their standard deviations, all values kept.

Printed are false alarms per 10,000 steps, how high undisturbed values rise by themselves in the same units, and the
share of events that are seen in time; PICTURE shows those of the loss.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from moe.config.detector import RobustDetectorConfig
from moe.stability.detector import Series, Severity, SpikeDetector
from pipelines.plotting import BLUE, DPI, GREEN, GRID, INK, ORANGE, WIDTH, frame

ROLLING = "mean + 6 sigma"
_SIZES = {"loss": (4, 6, 8, 9, 10, 12, 16), "grad_norm": (10, 20, 30, 40, 60)}
_PLACES = 20
_FIRST = 60
"""Steps after which events are laid: every rule needs some past."""
_PAST = 400
"""Steps that a rule sees before an event: more than any of them remembers."""
_DESCENT = 400
"""In which the loss falls fast."""

Alarms = list[bool]
Rule = Callable[[Sequence[float]], Alarms]


def robust(series: Series, severities: Set[Severity]) -> Rule:
    """The detector's alarms of these severities, over losses or logarithms of gradient norms."""

    def alarms(values: Sequence[float]) -> Alarms:
        detector = SpikeDetector(RobustDetectorConfig())
        if series == "loss":
            return [detector.see(value, 1.0)[0].severity in severities for value in values]
        return [detector.see(1.0, math.exp(value))[1].severity in severities for value in values]

    return alarms


def rolling_mean(values: Sequence[float]) -> Alarms:
    """Above the mean of the last 128 values by 6 standard deviations."""
    window: deque[float] = deque(maxlen=128)
    found = []
    for value in values:
        is_full = len(window) == 128
        found.append(is_full and value > float(np.mean(window)) + 6 * float(np.std(window)))
        window.append(value)
    return found


@dataclass(frozen=True)
class Kind:
    """An event's course in units of its height, and how many of its steps are time enough to see it."""

    course: tuple[float, ...]
    in_time: int
    before: int = 0
    """So many steps earlier a spike of 100 scatters is laid, too."""
    in_descent: bool = False


KINDS = {
    "one step": Kind((1.0,), 1),
    "ten steps": Kind((1.0,) * 10, 2),
    "dies away over 20 steps": Kind(tuple(math.exp(-step / 7) for step in range(20)), 2),
    "rises over 4 steps": Kind((0.25, 0.5, 0.75, 1.0), 4),
    "10 steps after a large one": Kind((1.0,), 1, before=10),
    "one step in the descent": Kind((1.0,), 1, in_descent=True),
}


Scale = Callable[[np.ndarray], float]
"""Robust standard deviation of deviations from the level, one that is sigma for normal ones."""


def mad(off: np.ndarray) -> float:
    """1.4826 times the median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(off)))


def qn(off: np.ndarray) -> float:
    """Qn: the first quartile of the distances of all pairs."""
    first, second = np.triu_indices(len(off), 1)
    half = len(off) // 2 + 1
    rank = half * (half - 1) // 2 - 1
    return 2.2191 * float(np.partition(np.abs(off[first] - off[second]), rank)[rank])


@dataclass(frozen=True)
class Trace:
    """A series, what was to be seen at each of its places, and the unit of heights there."""

    values: list[float]
    level: list[float]
    unit: list[float]

    @classmethod
    def of(cls, values: Sequence[float], scale: Scale = mad) -> Self:
        """Measured by what lies before and after each place."""
        level = [statistics.median(values[max(0, i - 10) : i + 11]) for i in range(len(values))]
        off = np.array(values) - np.array(level)
        unit = [scale(off[max(0, i - 100) : i + 101]) for i in range(len(values))]
        return cls(list(values), level, unit)

    def highest(self) -> float:
        """Of all values from ``_FIRST`` on, the greatest height over what was to be seen."""
        places = list(zip(self.values, self.level, self.unit, strict=True))[_FIRST:]
        return max((value - level) / unit for value, level, unit in places)


def recall(rule: Rule, traces: Sequence[Trace], kind: Kind, size: float, seed: int = 0) -> float:
    """Share of events that are seen in time."""
    generator = np.random.default_rng(seed)
    seen = []
    for trace in traces:
        last = _DESCENT if kind.in_descent else len(trace.values) - 30
        for place in generator.integers(_FIRST, last, _PLACES).tolist():
            first = max(0, place - _PAST)
            changed = trace.values[first : place + kind.in_time]
            for offset, height in enumerate(kind.course[: kind.in_time]):
                at = place + offset
                changed[at - first] = trace.level[at] + height * size * trace.unit[at]
            if kind.before:
                changed[place - first - kind.before] += 100 * trace.unit[place]
            seen.append(any(rule(changed)[place - first :]))
    return statistics.fmean(seen)


def false_alarms(rule: Rule, traces: Sequence[Trace]) -> float:
    """Alarms in 10,000 steps of traces that nothing was done to."""
    steps = sum(len(trace.values) for trace in traces)
    return 1e4 * sum(sum(rule(trace.values)) for trace in traces) / steps


Curves = dict[str, dict[str, list[float]]]
"""Share of events seen by height, of each kind and rule."""


def draw(curves: Curves, path: Path) -> None:
    """A panel for each kind of event of the loss, a line for each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI, layout="constrained")
    colours = {"act": BLUE, "warn": GREEN, ROLLING: ORANGE}
    for axes, (kind, rules) in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, curves.items(), strict=True):
        for rule, shares in rules.items():
            axes.plot(_SIZES["loss"], shares, "o-", color=colours[rule], label=rule, markersize=4, linewidth=1.6)
        axes.axhline(1.0, color=GRID, linewidth=1.2)
        frame(axes, kind)
    figure.supxlabel("height of the event, in robust standard deviations of the loss", fontsize=9, color=INK)
    figure.supylabel("share that is seen in time", fontsize=9, color=INK)
    figure.axes[0].legend(frameon=False, fontsize=8.5, labelcolor=INK)
    figure.savefig(path)


def main(path: Path, picture: Path | None = None) -> None:
    """Print the table."""
    data = np.load(path)
    print(data["about"])
    for name, rows in (("loss", data["loss"]), ("grad_norm", np.log(data["grad_norm"]))):
        traces = [Trace.of(row.astype(float).tolist()) for row in rows]
        series: Series = "loss" if name == "loss" else "grad_norm"
        rules: dict[str, Rule] = {
            "warn": robust(series, {"warn", "act"}),
            "act": robust(series, {"act"}),
            ROLLING: rolling_mean,
        }
        print(f"\n{name}: {len(traces)} traces, {sum(len(trace.values) for trace in traces)} steps")
        for rule_name, rule in rules.items():
            print(f"  {rule_name}: {false_alarms(rule, traces):.2f} false alarms in 10,000 steps")
        print("  highest of each trace, in scatters:", *(f"{trace.highest():.2f}" for trace in traces))
        print("  recall by height, in scatters".ljust(48), *(f"{size:5}" for size in _SIZES[name]))
        curves: Curves = {}
        for kind_name, kind in KINDS.items():
            curves[kind_name] = {}
            for rule_name, rule in rules.items():
                shares = [recall(rule, traces, kind, size) for size in _SIZES[name]]
                curves[kind_name][rule_name] = shares
                print(f"  {kind_name}; {rule_name}".ljust(48), *(f"{share:5.2f}" for share in shares), flush=True)
        if series == "loss":
            by_qn = [Trace.of(trace.values, qn) for trace in traces]
            print("  highest of each trace, in Qn:", *(f"{trace.highest():.2f}" for trace in by_qn))
            for kind_name in ("one step", "one step in the descent"):
                shares = [recall(rules["act"], by_qn, KINDS[kind_name], size) for size in _SIZES[name]]
                print(f"  {kind_name}, in Qn; act".ljust(48), *(f"{share:5.2f}" for share in shares), flush=True)
            if picture is not None:
                draw(curves, picture)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))
