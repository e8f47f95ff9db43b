"""The measures of a run that studies compare, by name, with what each is and in which unit. Imports no torch."""

from typing import Literal, get_args

MeasureName = Literal[
    "val_loss",
    "train_loss",
    "diverged",
    "max_vio_global",
    "max_vio_early",
    "max_vio_late",
    "max_vio_late_std",
    "steps_to_balance",
    "dead_experts",
    "loss_spikes",
    "grad_spikes",
    "spikes_left",
    "steps_lost",
    "clip_rate",
    "steps",
    "step_ms",
    "train_seconds",
    "real_experts_mean",
    "real_experts_spread",
    "token_complexity",
]

DESCRIPTIONS: dict[str, str] = {
    "val_loss": "validation loss at the end, nats per token, at most the loss before training",
    "train_loss": "training loss, mean of the last 5 % of steps, at most the loss before training",
    "diverged": "1 if the run diverged: a loss that is not finite, or an end above the loss before training",
    "max_vio_global": "MaxVio over the validation set at the end",
    "max_vio_early": "MaxVio of the batch, mean of the first 10 % of steps",
    "max_vio_late": "MaxVio of the batch, mean of the last 10 % of steps",
    "max_vio_late_std": "MaxVio of the batch, standard deviation over the last 20 % of steps",
    "steps_to_balance": "steps until MaxVio of the batch is under 3 times what uniform random routing has",
    "dead_experts": "experts that no validation token reached, over all layers",
    "loss_spikes": "spike score of the loss: percent of steps 7 standard deviations above the last 200",
    "grad_spikes": "spike score of the gradient norm before clipping, as for the loss",
    "spikes_left": "steps that spiked (the detector's limit to act on) and that training did not go back behind",
    "steps_lost": "steps whose update was refused, and steps that were taken back",
    "clip_rate": "share of the steps at which the clip changed the gradient",
    "steps": "optimizer steps of the schedule",
    "step_ms": "median time of a step in milliseconds, beside the trials that ran at the same time",
    "train_seconds": "steps times their median time: training without validation",
    "real_experts_mean": "routed experts that a token passes in a layer, identity experts not counted, mean of the "
    "last half of the steps",
    "real_experts_spread": "standard deviation over validation tokens of the real experts that they pass, over that "
    "of a binomial of the same mean: 1 is skipping at random",
    "token_complexity": "Spearman correlation over validation tokens of the real experts that a token passes with its "
    "loss under the reference arm of another seed, inside tenths of tokens of like frequency",
}

MEASURES: tuple[str, ...] = get_args(MeasureName)

OF_EXPERTS = frozenset(
    {
        "max_vio_global",
        "max_vio_early",
        "max_vio_late",
        "max_vio_late_std",
        "steps_to_balance",
        "dead_experts",
        "real_experts_mean",
        "real_experts_spread",
        "token_complexity",
    }
)
"""Measures that a dense model does not have."""
OF_CLIP = frozenset({"clip_rate"})
"""Measures that a run without a clip does not have."""
OF_TOKENS = frozenset({"real_experts_spread", "token_complexity"})
"""Measures that take the figures of every validation token (``validation.per_token``)."""
OF_SPIKES = frozenset({"loss_spikes", "grad_spikes"})
"""Measures that a run of too few steps does not have."""
OF_EVENTS = frozenset({"spikes_left", "steps_lost"})
"""Measures of a run's events rather than of its series."""
