"""Anticipatory routing: a step's experts were chosen by the weights and biases of some steps ago.

DeepSeek-V4 report, section 4.2.3: features, gates and gradients are today's, the indices of the experts are not, which
takes the feedback between router and backbone apart. The report keeps no second set of weights either: a batch is
looked at ``lag`` steps early, in a forward without gradients, and its indices wait in a queue. Not disclosed there,
and so this project's: the lag, what detects a spike, how long the mode lasts, and that the load of the waiting indices
is what moves the biases.

The lag ramps up: the first step of the mode routes as ever and chooses for the next ``lag`` batches at once, later
steps choose for one batch each, so the j-th step after it has a lag of ``min(j, lag)``. (Two batches a step instead
would spread the burst at the same cost, but the lag would grow half as fast.)

Shape legend: T tokens of this rank's share of a batch, K experts per token, M MoE layers, R equal parts of a global
batch, Q batches that are held, C tokens in a part.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from moe.config.anticipation import AlwaysAnticipationConfig, NoAnticipationConfig, TriggeredAnticipationConfig
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.layers.router import Router, Routing
from moe.parallel import Ranks
from moe.schedule import Moment, Timeline
from moe.stability.technique import Choose, Technique


class _Queue:
    """Expert ids of the batches to come, for this rank's share of each; where they stand in it follows from the step.

    A global batch is a row of tokens, cut into R equal parts of which each rank holds as many. R divides the sequences
    of every stage's batches, hence every number of ranks divides R, and a part is the same tokens for all of them.
    """

    def __init__(self, batches: int, model: ModelConfig, timeline: Timeline, ranks: Ranks) -> None:
        shapes = timeline.batch_shapes()
        self.ranks = ranks
        self.parts = math.gcd(*(sequences for sequences, _ in shapes))
        tokens = max(sequences * length for sequences, length in shapes) // self.parts
        shape = (self.parts // ranks.world, batches, model.num_moe_layers, tokens, model.moe.max_choices)
        self.ids_RQMCK = torch.zeros(shape, dtype=torch.int16, device=ranks.device)

    def put(self, step: int, chosen: Sequence[torch.Tensor]) -> None:
        """Keep the ids [T, K] of every layer for the batch of ``step``."""
        held_RMCK = self.ids_RQMCK[:, step % self.ids_RQMCK.shape[1]]
        for layer, ids_TK in enumerate(chosen):
            ids_RCK = ids_TK.unflatten(0, (len(held_RMCK), -1))
            held_RMCK[:, layer, : ids_RCK.shape[1]] = ids_RCK

    def get(self, moment: Moment) -> list[torch.Tensor]:
        """The ids [T, K], int64, of every layer for the batch at ``moment``."""
        tokens = moment.global_batch_size * moment.sequence_length // self.parts
        held_RMCK = self.ids_RQMCK[:, moment.step % self.ids_RQMCK.shape[1], :, :tokens]
        return [ids_RCK.flatten(0, 1).long() for ids_RCK in held_RMCK.unbind(dim=1)]

    def as_saved(self) -> torch.Tensor:
        """All ranks' parts as bytes, [R, Q, M, C, 2 K], over the same storage."""
        bytes_ = self.ids_RQMCK.view(torch.uint8)  # neither gloo nor NCCL carries int16
        if self.ranks.mesh is None:
            return bytes_
        from torch.distributed.tensor import DTensor, Shard

        # Over replicas, then over the ranks of each: in the order of the ranks.
        return DTensor.from_local(bytes_, self.ranks.mesh, (Shard(0), Shard(0)), run_check=False)


class Anticipation(Technique, ABC):
    """Anticipatory routing; a subclass says in which steps.

    A step that is refused (not finite) changes nothing here: the batch of the next step was chosen for as planned, and
    the refused step's own choice for a later one came from weights that are still there.
    """

    def __init__(
        self, config: AlwaysAnticipationConfig | TriggeredAnticipationConfig, model: ModelConfig, ranks: Ranks
    ) -> None:
        self.lag, self.model, self.ranks = config.lag, model, ranks
        # On the host, so that reading it waits for nothing: the first step that fills the queue, the first step whose
        # batch is not in it, the first step after the mode.
        self.progress = torch.zeros(3, dtype=torch.int64)
        self._now: int | None = None
        self._stale = torch.zeros(2, dtype=torch.int64, device=ranks.device)

    def on_timeline(self, timeline: Timeline) -> None:
        """Make the queue. One batch more than the lag, since a step's own ids are read after the next are written."""
        self._queue = _Queue(self.lag + 1, self.model, timeline, self.ranks)

    @abstractmethod
    def is_on(self, moment: Moment) -> bool:
        """Whether the step at ``moment`` is one of the mode."""

    def before_forward(self, choose: Choose, moment: Moment) -> list[torch.Tensor] | None:
        """Choose for the batch ``lag`` steps ahead, and give what was chosen for this one."""
        self._now = None
        self._stale.zero_()
        if not self.is_on(moment):
            self.drop()
            return None
        step = moment.step
        first, end, _ = self.progress.tolist()
        if not first < step < end:
            first, end = step, step + 1
        for ahead in range(end, min(step + self.lag + 1, moment.steps)):
            self._queue.put(ahead, choose(ahead))
            end = ahead + 1
        self.progress[0], self.progress[1] = first, end
        self._now = min(step - first, self.lag)
        return self._given(moment) if self._now else None

    def _given(self, moment: Moment) -> list[torch.Tensor]:
        """The ids for the layers at ``moment``."""
        return self._queue.get(moment)

    def after_forward(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """Count the decisions of this micro-batch, and those that today's weights would have made otherwise."""
        if not self._now:
            return
        for router, routing in zip(routers, routings, strict=True):
            own_TK = router.select(routing.affinity_TE, routing.domains_T)
            stale_T = (own_TK != routing.ids_TK).any(dim=1)  # both are sorted
            real_T = torch.ones_like(stale_T) if routing.real_T is None else routing.real_T
            self._stale += torch.stack(((stale_T & real_T).sum(), real_T.sum()))

    def figures(self) -> dict[str, float]:
        """The lag in steps, and the share of (token, layer) decisions with another set of experts than today's."""
        if self._now is None:
            return {}
        stale, decisions = self.ranks.sum_over_world(self._stale).tolist() if self._now else (0, 0)
        return {"moe/anticipation_lag": float(self._now), "moe/stale_share": stale / max(1, decisions)}

    def drop(self) -> None:
        """Forget all choices: coming batches are others than they were. The lag ramps up from 0 again."""
        self.progress[:2] = 0

    def state(self) -> dict[str, torch.Tensor]:
        """The ids, uint8 [R, Q, M, C, 2 K], divided among the ranks by R, and where the mode stands, int64 [3]."""
        return {"ids": self._queue.as_saved(), "progress": self.progress}


class AlwaysAnticipation(Anticipation):
    """In every step from the first on."""

    def is_on(self, moment: Moment) -> bool:
        """Always."""
        return True


class TriggeredAnticipation(Anticipation):
    """For some steps after a trigger."""

    def __init__(self, config: TriggeredAnticipationConfig, model: ModelConfig, ranks: Ranks) -> None:
        super().__init__(config, model, ranks)
        self.steps, self.at_steps = config.steps, frozenset(config.at_steps)
        self.shuffles = config.shuffle_layers

    def trigger(self, steps_done: int) -> None:
        """Be on for ``steps`` steps after the first ``steps_done``; prolongs what is on already."""
        self.progress[2] = steps_done + self.steps

    def before_step(self, moment: Moment) -> None:
        """Trigger where the config says so."""
        if moment.step in self.at_steps:
            self.trigger(moment.step)

    def _given(self, moment: Moment) -> list[torch.Tensor]:
        """Of other layers, if the config says so: those that choose turn by another number of places each step."""
        given = super()._given(moment)
        if not self.shuffles:
            return given
        fixed, choosing = given[: self.model.moe.hash_layers], given[self.model.moe.hash_layers :]
        places = 1 + moment.step % (len(choosing) - 1)
        return [*fixed, *choosing[places:], *choosing[:places]]

    def is_on(self, moment: Moment) -> bool:
        """Until the last trigger's steps are over."""
        return moment.step < int(self.progress[2])


ANTICIPATION: dict[type[Config], type[Technique]] = {
    NoAnticipationConfig: Technique,
    AlwaysAnticipationConfig: AlwaysAnticipation,
    TriggeredAnticipationConfig: TriggeredAnticipation,
}
