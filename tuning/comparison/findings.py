"""The most important findings in words, each with its figures and how many runs it rests on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines.description import count
from pipelines.spike_words import counted
from tuning.comparison.comparing import Comparison, Verdict
from tuning.comparison.divergences import pattern_of_divergences
from tuning.comparison.early import EARLY_ONLY, Early, early_keys, early_point
from tuning.comparison.effects import Effect, Measure, Side, effects, same_runs, splits
from tuning.comparison.keys import shown
from tuning.comparison.runs import ComparedRun
from tuning.statistics import Interval

MOST_FINDINGS = 3

# Of the loss: where an effect may be larger than that, one cannot say that there is none.
_TIGHT = 0.05

_VERDICTS: Mapping[Verdict, str] = {
    "better": "better beyond noise",
    "within noise": "within noise",
    "worse": "worse beyond noise",
    "cannot tell": "not to be told (too few seeds in common)",
    "no loss": "without a loss",
}


@dataclass(frozen=True)
class _Told:
    """A measure that findings are told of."""

    name: str
    measure: Measure
    least: float
    """A difference that matters, in its unit."""
    digits: int
    early: Early | None = None
    """Where it is measured, if that is not the end."""


def findings(comparison: Comparison) -> list[str]:
    """At most three sentences: what diverges, what the keys do beyond the noise, and what makes no difference.

    In this order: divergences, MaxVio, validation loss, spikes, and a key that does nothing. Where most runs never came
    to the end, the last is left out, for that of the survivors says little; instead the same measures follow at the
    point that nearly all have come to, of keys that have no effect at the end, in sentences that begin with that. If
    there is nothing to say, one sentence says that.
    """
    found = [sentence] if (sentence := _of_divergences(comparison)) else []
    early = early_point(comparison)
    on_the_way = early_keys(comparison.keys) if early is not None else []
    # Both places are looked at before anything is told.
    looks = sum(len(splits(comparison, key)) for key in (*comparison.keys, *on_the_way))
    measures = _measures(comparison)
    by_measure = {each.name: effects(comparison, each.measure, looks=looks) for each in measures}
    strongest = [(each, _strongest(by_measure[each.name], each.least)) for each in measures]
    told = {best.split.key for _, best in strongest if best is not None}
    if early is not None:
        keys = [key for key in on_the_way if key not in told]
        for each in _early_measures(early):
            strongest.append((each, _strongest(effects(comparison, each.measure, keys, looks), each.least)))
    found += [_sentence(comparison, each, best) for each, best in strongest if best is not None]
    if early is None and len(found) < MOST_FINDINGS and (idle := _without_effect(comparison, by_measure, told)):
        found.append(idle)
    return found[:MOST_FINDINGS] or [_nothing(comparison, early)]


def headline(comparison: Comparison) -> str:
    """The best configuration in a sentence, with what cannot be told from it."""
    runs, best = counted(len(comparison.runs), "run"), comparison.reference
    lead = f"{runs} of {counted(len(comparison.configurations), 'configuration')}"
    lost = f", {len(comparison.diverged)} diverged" if comparison.diverged else ""
    if best is None:
        return f"{lead}{lost}; none has finished, so there is nothing to rank."
    values = ", ".join(f"{key} {shown(value)}" for key, value in best.values.items()) or "the only one"
    loss = best.loss
    assert loss is not None
    seeds = counted(loss.n, "seed")
    figure = f"{loss.mean:.4f} ± {(loss.high - loss.low) / 2:.4f} nats per token" if loss.n > 1 else f"{loss.mean:.4f}"
    compared = f"; {_of_others(comparison)}" if len(comparison.configurations) > 1 else ""
    return (
        f"{lead}{lost}; compared with {best.name.split()[0]} ({values}): validation loss {figure} ({seeds}){compared}."
    )


def _of_others(comparison: Comparison) -> str:
    """How the other configurations lie to the reference."""
    others = [each for each in comparison.configurations if each is not comparison.reference]
    found = Counter(comparison.difference(each).verdict for each in others)
    named = {verdict: words for verdict, words in _VERDICTS.items() if found[verdict]}
    return f"of {counted(len(others), 'other')} " + ", ".join(f"{found[v]} {words}" for v, words in named.items())


def _measures(comparison: Comparison) -> Sequence[_Told]:
    def spikes(run: ComparedRun) -> float | None:
        return float(run.spikes_by(comparison.tokens)) if run.state == "finished" else None

    return _told(comparison.finished, comparison.max_vio, comparison.loss, spikes, None)


def _early_measures(early: Early) -> Sequence[_Told]:
    return _told(early.runs, early.max_vio, early.loss, early.spikes, early)


def _told(
    runs: Sequence[ComparedRun], max_vio: Measure, loss: Measure, spikes: Measure, early: Early | None
) -> Sequence[_Told]:
    losses = [value for run in runs if (value := loss(run)) is not None]
    return (
        _Told("MaxVio", max_vio, 0.05, 2, early),
        # A tenth of a percent; less is of no use to anybody.
        _Told("validation loss", loss, 1e-3 * fmean(losses) if losses else 0.0, 4, early),
        _Told("number of spikes", spikes, 0.5, 1, early),
    )


def _strongest(found: Mapping[str, Sequence[Effect]], least: float) -> Effect | None:
    seen = [e for each in found.values() for e in each if e.is_seen and abs(e.difference.mean) >= least]
    return max(seen, key=lambda effect: effect.strength, default=None)


def _of_divergences(comparison: Comparison) -> str | None:
    if not comparison.diverged:
        return None
    pattern = pattern_of_divergences(comparison)
    number = len(comparison.diverged)
    if pattern is None:
        return f"{number} of {len(comparison.runs)} runs diverged."
    ended = [run for run in comparison.runs if run.state in ("finished", "diverged")]
    also = _also(same_runs(comparison, pattern.sides[0], ended) if len(pattern.sides) == 1 else [])
    kind = f"{pattern.kind}{also}"
    inside, outside = (
        f"{pattern.diverged} of {pattern.runs}",
        f"{pattern.diverged_elsewhere} of {pattern.runs_elsewhere}",
    )
    if pattern.is_seen:
        return f"{kind} diverged in {inside} runs, all others in {outside}."
    return (
        f"{number} of {len(comparison.runs)} runs diverged; {kind} tells them best ({inside} runs, all others "
        f"{outside}), which may be chance."
    )


def _sentence(comparison: Comparison, told: _Told, effect: Effect) -> str:
    """The worse side first: it is what to keep away from."""
    worse, better = (effect.split.right, effect.split.left), (effect.right, effect.left)
    sides, means = (worse, better) if effect.difference.mean > 0 else (worse[::-1], better[::-1])
    high, low = (f"{mean:.{told.digits}f}" for mean in means)
    verb = "leaves MaxVio at" if told.name == "MaxVio" else f"has a {told.name} of"
    side = f"{sides[0].words}{_also(same_runs(comparison, sides[0], effect.runs) if not effect.blocks else [])}"
    figures = f"difference {_plus_minus(effect.difference, told.digits)}, {_basis(effect)}"
    against = f"against {low} {sides[1].against} ({figures})"
    if told.early is None:
        return f"{side} {verb} {high} after {count(comparison.tokens)} tokens, {against}."
    return f"{EARLY_ONLY} ({told.early.words}): {side} {verb} {high}, {against}; that need not hold at the end."


def _also(sides: Sequence[Side]) -> str:
    """That the runs are no evidence for the one rather than for the others."""
    return f" (in the same runs as {' and '.join(side.words for side in sides)})" if sides else ""


def _without_effect(
    comparison: Comparison, by_measure: Mapping[str, Mapping[str, Sequence[Effect]]], told: set[str]
) -> str | None:
    """The key of which one can say most tightly that it does nothing to the loss, nor anything to other measures."""
    losses = by_measure["validation loss"]
    idle = [
        key
        for key in losses
        if key not in told and not any(effect.is_seen for found in by_measure.values() for effect in found.get(key, ()))
    ]
    bounds = {key: max(_bound(effect.difference) for effect in losses[key]) for key in idle}
    apart = [key for key in idle if not any(_confounded(comparison, effect) for effect in losses[key])]
    key = min(apart, key=lambda key: bounds[key], default=None)
    if key is None or bounds[key] > _TIGHT * fmean(effect.left for effect in losses[key]):
        return None
    values = sorted({run.settings[key] for run in comparison.finished if key in run.settings}, key=_order)
    widest = max(losses[key], key=lambda effect: _bound(effect.difference))
    listed = ", ".join(shown(value) for value in values[:5]) + (" …" if len(values) > 5 else "")
    return (
        f"{key} ({listed}) makes no difference to the validation loss that {_basis(widest)} can tell; "
        f"it is at most {bounds[key]:.4f}."
    )


def _confounded(comparison: Comparison, effect: Effect) -> bool:
    """Whether another key changes with this one in all runs: what the two do may cancel out."""
    return not effect.blocks and bool(same_runs(comparison, effect.split.left, effect.runs))


def _order(value: object) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if isinstance(value, int | float) else 0.0, str(value)


def _bound(difference: Interval) -> float:
    return max(abs(difference.low), abs(difference.high))


def _basis(effect: Effect) -> str:
    if effect.blocks:
        return f"{effect.blocks} blocks of runs that differ in it alone"
    number = effect.difference.n
    of = f" of {number} configurations" if number < len(effect.runs) else ""
    return f"{len(effect.runs)} runs{of} that differ in other keys too"


def _plus_minus(difference: Interval, digits: int) -> str:
    half = (difference.high - difference.low) / 2
    return f"{abs(difference.mean):.{digits}f} ± {half:.{digits}f}"


def _nothing(comparison: Comparison, early: Early | None) -> str:
    runs, configurations = (
        counted(len(comparison.runs), "run"),
        counted(len(comparison.configurations), "configuration"),
    )
    on_the_way = f", neither at the end nor {early.after}" if early is not None else ""
    return f"No effect of a key can be told from noise with these {runs} of {configurations}{on_the_way}."
