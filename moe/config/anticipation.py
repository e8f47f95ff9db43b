"""Routing by choices made some steps ago. ``stability.anticipation``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moe.config.base import Config
from moe.config.model import ModelConfig


class NoAnticipationConfig(Config):
    """Every layer routes by what it sees in the step itself."""

    kind: Literal["none"] = "none"


class AlwaysAnticipationConfig(Config):
    """Anticipatory routing in every step (DeepSeek-V4 report, section 4.2.3, where it is on after spikes alone)."""

    kind: Literal["always"] = "always"
    lag: PositiveInt = 4
    """By how many steps the weights that choose experts are older than those that train. The report does not say;
    4 is this project's. (lag + 1) batches of expert ids are held, 2 bytes each."""


class TriggeredAnticipationConfig(Config):
    """Anticipatory routing for a while after a trigger (DeepSeek-V4 report, section 4.2.3).

    The report discloses neither the lag, nor what detects a spike, nor how long the mode lasts.
    """

    kind: Literal["triggered"] = "triggered"
    lag: PositiveInt = 4
    """As of ``always``; reached after as many steps of the mode."""
    shuffle_layers: bool = False
    """A control for studies, which no model should be trained with: the layers exchange their choices, each step in
    another order. What helps as much as anticipation did with this on is noise in routing."""
    steps: PositiveInt = 100
    """Steps that a trigger lasts, the first of which, that fills the queue, routes as ever; a trigger in the meantime
    counts from anew. A value of this project."""
    at_steps: list[PositiveInt] = Field(default_factory=list)
    """Triggers besides those that come from outside (`moe.trainer.Trainer.anticipate`): the mode is on from the step
    after each of these (optimizer steps, counted from 1), as after a spike there."""


AnticipationConfig = Annotated[
    NoAnticipationConfig | AlwaysAnticipationConfig | TriggeredAnticipationConfig, Field(discriminator="kind")
]


def anticipation_problem(anticipation: AnticipationConfig, model: ModelConfig, steps: int) -> str | None:
    """Why experts cannot be anticipated in this model over so many optimizer steps, in one line; None if they can."""
    if isinstance(anticipation, NoAnticipationConfig):
        return None
    moe, choosing = model.moe, model.num_choosing_layers
    name, kind = "stability.anticipation", f"stability.anticipation.kind is {anticipation.kind}"
    if moe.num_experts == 0:
        return f"{kind}, but model.moe.num_experts is 0: there is no expert to choose; set it to none"
    if moe.top_k >= moe.router_outputs:
        return f"{kind}, but model.moe.top_k is model.moe.num_experts ({moe.top_k}): every expert is chosen in any case"
    if anticipation.lag >= steps:
        return f"{name}.lag ({anticipation.lag}) is never reached in {steps} steps; make it smaller"
    if isinstance(anticipation, TriggeredAnticipationConfig):
        if anticipation.steps <= anticipation.lag:
            return (
                f"{name}.steps ({anticipation.steps}) ends the mode before its lag ({anticipation.lag}) is reached; "
                f"make it at least {anticipation.lag + 1}"
            )
        if anticipation.shuffle_layers and choosing < 2:
            return f"{name}.shuffle_layers needs two MoE layers that choose, and the model has {choosing}"
        if late := [step for step in anticipation.at_steps if step >= steps]:
            return f"{name}.at_steps: there is no step after step {late[0]} of {steps} in all"
    return None
