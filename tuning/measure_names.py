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
    "clip_rate",
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
    "clip_rate": "share of the steps at which the clip changed the gradient",
}

MEASURES: tuple[str, ...] = get_args(MeasureName)

OF_EXPERTS = frozenset(
    {"max_vio_global", "max_vio_early", "max_vio_late", "max_vio_late_std", "steps_to_balance", "dead_experts"}
)
"""Measures that a dense model does not have."""
OF_CLIP = frozenset({"clip_rate"})
"""Measures that a run without a clip does not have."""
OF_SPIKES = frozenset({"loss_spikes", "grad_spikes"})
"""Measures that a run of too few steps does not have."""
