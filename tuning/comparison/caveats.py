"""What stands in the way of the comparison: unequal seeds, text, budgets, models, machines."""

from collections.abc import Callable, Iterable, Sequence

from pipelines.description import count
from pipelines.run_folder import read_json
from pipelines.spike_words import counted
from tuning.comparison.comparing import Comparison
from tuning.comparison.early import EARLY_ONLY, early_point
from tuning.comparison.runs import ComparedRun

_LISTED = 8
# What a validation loss in nats per token is of.
_MEASURING_KEYS = ("data.tokenizer", "data.sequence_length", "data.intra_document_masking", "validation.max_tokens")
_NUMBER_OF_COMPARISONS = 5


def caveats(comparison: Comparison) -> list[str]:
    """Sentences, the gravest first; empty if all is alike."""
    checks = (
        _texts,
        _measured_otherwise,
        _sizes,
        _budgets,
        _not_at_the_end,
        _seeds,
        _repeated_seeds,
        _diverged,
        _not_validated,
        _between_validations,
        _machines,
        _many,
    )
    return [sentence for check in checks if (sentence := check(comparison)) is not None]


def matching(comparison: Comparison) -> str:
    """At what the values are compared."""
    every = "every finished run" if comparison.finished else "no run has finished, and the longest"
    at_the_end = (
        f"Losses, MaxVio, spikes and steps lost are those after {comparison.tokens:,} training tokens "
        f"({count(comparison.tokens)}), the most that {every} has validated after."
    )
    early = early_point(comparison)
    if early is None:
        return at_the_end
    return (
        f"{at_the_end} Most runs never came there; “{EARLY_ONLY}” is of the last point that nearly all have validated "
        f"at ({early.words}). Findings leave out what lasts a number of steps there, as a warm-up does: a long one has "
        "a higher loss early by construction."
    )


def _texts(comparison: Comparison) -> str | None:
    unknown = [run for run in comparison.runs if run.dataset is None]
    groups = _grouped(comparison.runs, lambda run: run.dataset[:8] if run.dataset is not None else "unknown")
    if len(groups) > 1:
        return f"The text differs, so that losses are of different things: {_listed_groups(groups)}."
    if unknown:
        return f"Whether all read the same text is not recorded: {_names(unknown)}."
    return None


def _measured_otherwise(comparison: Comparison) -> str | None:
    keys = [key for key in _MEASURING_KEYS if key in comparison.keys]
    return f"Validation losses are not of the same thing, for {' and '.join(keys)} differ." if keys else None


def _sizes(comparison: Comparison) -> str | None:
    def size(run: ComparedRun) -> str:
        total, active = (run.history.last(f"model/{name}") for name in ("parameters", "active_parameters"))
        return "unknown" if total is None else f"{count(total)}, {count(active or total)} active"

    groups = _grouped(comparison.runs, size)
    return f"Models differ in their number of parameters: {_listed_groups(groups)}." if len(groups) > 1 else None


def _budgets(comparison: Comparison) -> str | None:
    groups = _grouped(comparison.runs, lambda run: f"{count(run.budget)} tokens in {run.config.steps:,} steps")
    if len(groups) == 1:
        return None
    return (
        f"Budgets differ: {_listed_groups(groups)}. Losses are compared after {count(comparison.tokens)} tokens, where "
        "the learning rate of a longer schedule has not come down yet."
    )


def _not_at_the_end(comparison: Comparison) -> str | None:
    cut = comparison.cut_short
    if not cut:
        return None
    words = ", ".join(f"{run.info.name} ({run.words})" for run in cut[:_LISTED]) + _more(len(cut))
    has = "was not trained to its end and is" if len(cut) == 1 else "were not trained to their end and are"
    kept = (
        " Where that was for their losses, differences at the end are among survivors." if comparison.finished else ""
    )
    return f"{counted(len(cut), 'run')} {has} in no mean of the end: {words}.{kept}"


def _seeds(comparison: Comparison) -> str | None:
    groups: dict[str, list[str]] = {}
    for each in comparison.configurations:
        groups.setdefault(", ".join(map(str, each.seeds)), []).append(f"#{each.number}")
    if len(groups) == 1:
        only = next(iter(groups))
        if "," in only:
            return None
        return f"Each configuration has one seed ({only}): no difference can be told from noise."
    parts = []
    for seeds, numbers in sorted(groups.items(), key=lambda both: -len(both[0])):
        noun = "seeds" if "," in seeds else "seed"
        parts.append(f"{noun} {seeds} in {', '.join(numbers[:_LISTED])}{_more(len(numbers))}")
    return f"Seeds are unequal: {'; '.join(parts)}. Differences are of the seeds that both have."


def _repeated_seeds(comparison: Comparison) -> str | None:
    found = [f"#{each.number}" for each in comparison.configurations if len(each.seeds) < len(each.runs)]
    if not found:
        return None
    return f"Some seed was run several times in {', '.join(found[:_LISTED])}{_more(len(found))}; its runs count as one."


def _diverged(comparison: Comparison) -> str | None:
    lost = comparison.diverged
    if not lost:
        return None
    names = ", ".join(f"{run.info.name} ({run.words.removeprefix('diverged: ')})" for run in lost[:_LISTED])
    return (
        f"{counted(len(lost), 'run')} diverged: in no mean, ranked last, and drawn at the edge: "
        f"{names}{_more(len(lost))}."
    )


def _not_validated(comparison: Comparison) -> str | None:
    missing = [run for run in comparison.finished if comparison.loss(run) is None]
    return f"Not validated by then, and so in no mean: {_names(missing)}." if missing else None


def _between_validations(comparison: Comparison) -> str | None:
    measured = [run for run in comparison.finished if comparison.loss(run) is not None]
    between = [run for run in measured if not run.measured_at("val/loss", comparison.tokens)]
    if not between:
        return None
    return f"Not validated just there, so taken along a line between two validations: {_names(between)}."


def _machines(comparison: Comparison) -> str | None:
    def machine(run: ComparedRun) -> str:
        known = read_json(run.folder.environment)
        if not known:
            return "unknown"
        return f"{known['cpu']}, {known['cores']} cores, torch {known['packages'].get('torch', 'unknown')}"

    groups = _grouped(comparison.runs, machine)
    return f"Machines or versions differ, so times do: {_listed_groups(groups)}." if len(groups) > 1 else None


def _many(comparison: Comparison) -> str | None:
    judged = [each for each in comparison.configurations if comparison.difference(each).paired is not None]
    if len(judged) < _NUMBER_OF_COMPARISONS:
        return None
    return (
        f"Of {len(judged)} differences with 95 % intervals, one in twenty is beyond noise by chance alone, and the "
        "best of many configurations looks better than it is."
    )


def _grouped(runs: Iterable[ComparedRun], what: Callable[[ComparedRun], str]) -> dict[str, list[ComparedRun]]:
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(what(run), []).append(run)
    return groups


def _listed_groups(groups: dict[str, list[ComparedRun]]) -> str:
    return "; ".join(f"{name} ({_names(runs)})" for name, runs in groups.items())


def _names(runs: Sequence[ComparedRun]) -> str:
    return ", ".join(run.info.name for run in runs[:_LISTED]) + _more(len(runs))


def _more(number: int) -> str:
    return f" and {number - _LISTED:,} more" if number > _LISTED else ""
