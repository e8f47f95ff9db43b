"""The Trainer: one optimizer step, in order.

It knows no framework. Ranks advance in lockstep: every method that is marked collective must be called by all of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe.batch import Batch, BatchSource
from moe.config.fp8 import DeepseekV3Fp8Config
from moe.config.schedule import StagedSchedule
from moe.config.trainer import TrainerConfig
from moe.fp8.place import use_fp8
from moe.fsdp import release_gathered, shard_dense_parameters, sync_gradients
from moe.hooks import Seen, StepHook
from moe.init import initialise
from moe.loss import counted_targets, cross_entropy_sum
from moe.model import Transformer
from moe.monitors import measure
from moe.optim import build_optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.precision import compute_dtype
from moe.registry import collect_state
from moe.replicas import Replicas
from moe.report import REQUESTS, Evaluation, Report, Request
from moe.routing_stats import (
    RoutingStats,
    bias_range,
    max_violation,
    mean_pairwise_cosine,
    real_expert_figures,
    violation_figures,
)
from moe.schedule import Moment, Timeline
from moe.stability.anticipation import Anticipation, TriggeredAnticipation
from moe.stability.detector import Reading, SpikeDetector
from moe.stability.families import build_techniques
from moe.stability.technique import BatchCounts, GradientNorms, StepLoad
from moe.start_check import check_start
from moe.state import TrainingState
from moe.traffic import Spread

# Expert ids [T, K] of one micro-batch, for every MoE layer.
_Chosen = Sequence[torch.Tensor]


@dataclass
class _StepSums:
    """What the micro-batches of one step add up to on this rank; tensors on the device."""

    routing: RoutingStats
    loss: dict[str, torch.Tensor] = field(default_factory=dict)


class Trainer:
    """Trains one model from a config and a source of batches. Everything it depends on is seeded and built here.

    Nothing random happens after the weights are drawn, so there is no generator state to save.
    """

    def __init__(self, config: TrainerConfig, ranks: Ranks, batches: BatchSource) -> None:
        """Collective. ``config.model.vocab_size`` must be set; ``batches`` gives this rank's share of a step."""
        self.config, self.ranks, self.batches = config, ranks, batches
        self.steps_done = 0
        self.timeline = Timeline(config)
        if ranks.device.type == "cpu":
            torch.set_num_threads(config.parallel.threads)
        self.model = Transformer(config.model, ranks, compute_dtype(config.precision)).to(ranks.device)
        initialise(self.model, config.model.init, config.seed, ranks)
        fp8 = config.precision.fp8
        self.fp8_tally = use_fp8(self.model, fp8, ranks) if isinstance(fp8, DeepseekV3Fp8Config) else None
        sharded = config.parallel.dense == "shard"
        if sharded:
            shard_dense_parameters(self.model, ranks)
        self.parameters = ParameterSet(self.model, ranks, dense_is_sharded=sharded)
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        self.techniques = build_techniques(config.stability, config.model, ranks)
        for technique in self.techniques.values():
            technique.watch(self.model)
            technique.before_training(self.parameters)
            technique.on_timeline(self.timeline)
        self.detector = SpikeDetector(config.detector)
        self.replicas = Replicas(self.model, self.parameters, config.monitors.replicas_every_steps)
        self.routers = [layer.router for layer in self.model.moe_layers()]
        self.choosing = slice(config.model.moe.hash_layers, None)
        """Which MoE layers choose their experts: all but the first, hash-routed ones."""
        nodes = config.parallel.expert_nodes
        self.nodes = None if nodes is None else Spread(config.model.moe.num_experts, nodes)
        self.hooks: list[StepHook] = []
        self._requested: set[Request] = set()

    def step(self) -> Report:
        """One optimizer step. Collective."""
        moment = self.timeline.at(self.steps_done)
        if self._stage_begins(moment):
            self.detector.forget()
        for hook in self.hooks:
            hook.before_step(moment)
        differing = self.replicas.differing(self.steps_done)
        micro_batches = [batch.to(self.ranks.device) for batch in self.batches(self.steps_done)]
        counts = self._count(micro_batches, moment)
        self.parameters.clear_gradients()
        self.ranks.wire.clear()
        for technique in self.techniques.values():
            technique.before_step(moment)
        chosen = self._given_experts(micro_batches, moment)
        if self.fp8_tally is not None:
            self.fp8_tally.clear()  # of what chose experts for later batches, too
        sums = self._forward_backward(micro_batches, chosen, counts, moment)
        for hook in self.hooks:
            hook.after_backward(moment)
        self.parameters.reduce_gradients()
        norms = self._measure_gradients()
        metrics, load, requests = self._gather(sums, counts)
        finite = math.isfinite(metrics["train/loss"]) and math.isfinite(norms.total)
        metrics["train/lr"] = self._lr(moment)
        for technique in self.techniques.values():
            metrics |= technique.figures()
        metrics |= {"train/grad_norm": norms.total} | {f"grad_norm/{g}": n for g, n in norms.groups.items()}
        readings = self.detector.see(metrics["train/loss"], norms.total)
        metrics |= {f"spike/score_{r.series}": r.score for r in readings if r.score is not None}
        seen = Seen(self.steps_done + 1, moment, readings, finite, metrics, differing)
        # All of them, whatever one says: each may have something to note.
        answers = [hook.takes(seen) for hook in self.hooks]
        taken = finite and all(answers)
        if taken:
            metrics |= self._update(norms, load, moment)
        self.steps_done += 1
        health = None
        if self._is_time_to_measure(moment, readings):
            health = measure(self.model, micro_batches[0], self.ranks)
            # What a technique reports of the whole step stands against the figure of one micro-batch.
            metrics = health.headline() | metrics
        max_vio, idle = self._by_layer(load)
        return Report(self.steps_done, taken, moment, metrics, requests, max_vio, idle, readings, health, differing)

    def _by_layer(self, load: StepLoad | None) -> tuple[tuple[float, ...], tuple[int, ...]]:
        if load is None:
            return (), ()
        counts_ME = self._with_weights(load.counts_ME)
        return tuple(max_violation(counts_ME).tolist()), tuple((counts_ME == 0).sum(dim=1).tolist())

    def _lr(self, moment: Moment) -> float:
        return moment.lr * math.prod(hook.lr_factor(moment) for hook in self.hooks)

    def _is_time_to_measure(self, moment: Moment, readings: Sequence[Reading]) -> bool:
        """At intervals, and at events: a stage begins, or there is a spike and one wants to know where."""
        every = self.config.monitors.every_steps
        if not every:
            return False
        spike = any(reading.severity == "act" for reading in readings)
        return self.steps_done % every == 0 or spike or self._stage_begins(moment)

    def _stage_begins(self, moment: Moment) -> bool:
        """Whether the step is the first of any stage but the first."""
        staged = isinstance(self.config.schedule, StagedSchedule) and moment.step > 0
        return staged and self.timeline.at(moment.step - 1).stage != moment.stage

    def check_start(self) -> None:
        """Compare the weights just drawn with ``model.init``, if that says so. Collective; every rank ends alike.

        For a run that starts from random weights, before its first step; whoever fills in others leaves it out.

        Raises:
            ValueError: an embedding or a logit is not of the size that follows from the config; one line.
        """
        if self.config.model.init.check:
            check_start(self.model, self.batches(0)[0].to(self.ranks.device), self.ranks)

    def _count(self, micro_batches: list[Batch], moment: Moment) -> BatchCounts:
        """What the global batch holds. Collective whether this rank has padding or not: another rank may."""
        depth, length = self.config.model.mtp.depth, moment.sequence_length
        local = [sum(_predicted(batch, length, shift) for batch in micro_batches) for shift in (0, 1, 1 + depth)]
        inputs, tokens, ahead = self.ranks.sum_over_world(torch.tensor(local, device=self.ranks.device)).tolist()
        # At least 1: a batch of nothing but padding has a loss of 0, not 0 / 0.
        return BatchCounts(max(1, tokens), max(1, ahead) * depth, moment.global_batch_size, max(1, inputs))

    def _given_experts(self, micro_batches: list[Batch], moment: Moment) -> list[_Chosen | None]:
        """What each micro-batch's MoE layers take instead of choosing."""
        given = [technique.before_forward(self.choose, moment) for technique in self.techniques.values()]
        chosen = next((ids for ids in given if ids is not None), None)
        if chosen is None:
            return [None] * len(micro_batches)
        tokens = [batch.ids_BL.shape[0] * moment.sequence_length for batch in micro_batches]
        return list(zip(*(ids_TK.split(tokens) for ids_TK in chosen), strict=True))

    @torch.no_grad()
    def choose(self, step: int) -> list[torch.Tensor]:
        """Expert ids that the model as it is chooses for this rank's share of the batch of ``step``. Collective.

        [T, K] for each MoE layer, its micro-batches joined; nothing is counted. ``step`` is from 0.
        """
        with self.ranks.wire.uncounted():
            chosen = [self.model.choose(batch.to(self.ranks.device)) for batch in self.batches(step)]
        release_gathered(self.model)
        return [torch.cat(layer) for layer in zip(*chosen, strict=True)]

    def _forward_backward(
        self, micro_batches: list[Batch], chosen: Sequence[_Chosen | None], counts: BatchCounts, moment: Moment
    ) -> _StepSums:
        """Gradients of this rank's share of the loss, accumulated over its micro-batches.

        Every term is summed up as it enters the loss, its weight included (``train/mtp_loss``, ``train/balance_loss``).
        """
        sums = _StepSums(RoutingStats(self.ranks.device, self.nodes))
        for index, batch in enumerate(micro_batches):
            sync_gradients(self.model, index == len(micro_batches) - 1)
            output = self.model(batch, chosen[index])
            length = output.logits.shape[1]
            terms = {"loss": cross_entropy_sum(output.logits, counted_targets(batch, length, 1)) / counts.tokens}
            if output.mtp_logits is not None:
                mtp_sum = cross_entropy_sum(output.mtp_logits, counted_targets(batch, length, 2))
                terms["mtp_loss"] = mtp_sum * (self.config.model.mtp.loss_weight / counts.mtp_tokens)
            for technique in self.techniques.values():
                terms |= technique.loss_terms(batch, output, counts, moment)
            torch.stack(list(terms.values())).sum().backward()
            sums.routing.add(output.routings)
            with torch.no_grad():
                for technique in self.techniques.values():
                    technique.after_forward(self.routers[self.choosing], output.routings[self.choosing])
            for name, term in terms.items():
                sums.loss[name] = sums.loss.get(name, 0.0) + term.detach().double()
        return sums

    def _measure_gradients(self) -> GradientNorms:
        norms = self.parameters.norms()
        return GradientNorms(norms.pop("total"), norms)

    def _gather(
        self, sums: _StepSums, counts: BatchCounts
    ) -> tuple[dict[str, float], StepLoad | None, frozenset[Request]]:
        """Sum what the ranks saw; the same result on every rank."""
        routing, wire, device = sums.routing, self.ranks.wire, self.ranks.device
        asked = [float(name in self._requested) for name in REQUESTS]
        self._requested.clear()
        host = torch.tensor([wire.payload, wire.metadata, *asked], dtype=torch.float64, device=device)
        fp8 = [] if self.fp8_tally is None else [self.fp8_tally.sums]
        sums_of_routing = (routing.entropy, routing.decisions, routing.visits)
        local = torch.cat((torch.stack([*sums.loss.values(), *sums_of_routing]), host, *fp8))
        summed = self.ranks.sum_over_world(local).tolist()
        metrics = {f"train/{name}": summed.pop(0) for name in sums.loss}
        entropy, decisions, visits, payload, metadata, *rest = summed
        asked, fp8_sums = rest[: len(REQUESTS)], rest[len(REQUESTS) :]
        if self.fp8_tally is not None:
            metrics |= self.fp8_tally.figures(fp8_sums)
        requests = frozenset(name for name, count in zip(REQUESTS, asked, strict=True) if count)
        if routing.counts_ME is None:
            return metrics, None, requests
        counts_MCE = None if routing.counts_MCE is None else self.ranks.sum_over_world(routing.counts_MCE)
        load = StepLoad(self.ranks.sum_over_world(routing.counts_ME), counts_MCE)
        hash_layers = self.config.model.moe.hash_layers
        metrics |= violation_figures("moe/max_vio_batch", self._with_weights(load.counts_ME), hash_layers)
        if counts_MCE is not None:
            of_classes = self._with_weights(counts_MCE[hash_layers:].flatten(0, 1))
            metrics["moe/max_vio_domain_worst"] = float(max_violation(of_classes).max())
        if routing.nodes is not None:
            metrics["moe/nodes_per_token"] = visits / max(1.0, decisions)
        metrics |= {
            "moe/router_entropy": entropy / max(1.0, decisions),
            "moe/router_logit_max": float(self.ranks.max_over_world(routing.logit_max)),
            "train/ep_bytes_per_token": payload / counts.tokens,
            "train/ep_metadata_bytes_per_token": metadata / counts.tokens,
        }
        if routing.real_experts is not None:
            metrics |= real_expert_figures(self.ranks.sum_over_world(routing.real_experts), decisions)
        return metrics, load, requests

    def _with_weights(self, counts_ME: torch.Tensor) -> torch.Tensor:
        """Load of the experts with weights: how many tokens go to identity experts is nobody's burden."""
        return counts_ME[:, : self.config.model.moe.num_experts]

    @torch.no_grad()
    def _update(self, norms: GradientNorms, load: StepLoad | None, moment: Moment) -> dict[str, float]:
        """Clip, step, and whatever follows a step that was taken."""
        metrics: dict[str, float] = {}
        for technique in self.techniques.values():
            figures = technique.on_gradients(self.parameters, norms, self.optimizer, moment)
            metrics |= {f"train/{name}": value for name, value in figures.items()}
        before = [p.local.clone() for p in self.parameters.all]
        lr = self._lr(moment) * math.prod(technique.lr_factor(moment) for technique in self.techniques.values())
        metrics["train/lr"] = lr
        metrics |= {f"train/{name}": value for name, value in self.optimizer.step(lr).items()}
        for technique in self.techniques.values():
            metrics |= technique.edit_weights(self.parameters, moment)
        torch._foreach_sub_(before, [p.local for p in self.parameters.all])
        update = self.parameters.norms(before)
        metrics["train/update_norm"] = update.pop("total")
        metrics |= {f"update_norm/{group}": norm for group, norm in update.items()}
        if load is not None:
            for technique in self.techniques.values():
                technique.after_step(self.routers[self.choosing], load.after(self.config.model.moe.hash_layers), moment)
            metrics |= self._router_figures()
        return metrics

    def _router_figures(self) -> dict[str, float]:
        """Figures of the routers as they are, each the largest over the layers; one transfer for all."""
        biases_ME = torch.cat([router.biases for router in self.routers])  # with classes, one row for each
        figures = {"moe/bias_abs_max": biases_ME.abs().max(), "moe/bias_range": bias_range(biases_ME).max()}
        experts = biases_ME.shape[1]
        if experts > 1:
            similarity_M = mean_pairwise_cosine(self.parameters.router_unit_sums(), experts)
            figures["moe/router_similarity"] = similarity_M.max().float()
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and load over this rank's held-out batches, summed over all ranks. Collective.

        Every rank must bring the same number of batches. Training state is not touched.
        """
        device = self.ranks.device
        routing = RoutingStats(device)
        loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in (b.to(device) for b in batches):
            output = self.model(batch)
            targets = counted_targets(batch, output.logits.shape[1], 1)
            loss_sum += cross_entropy_sum(output.logits, targets).double()
            tokens += int((targets != -100).sum())
            routing.add(output.routings)
        total = self.ranks.sum_over_world(torch.stack((loss_sum, loss_sum.new_tensor(tokens)))).tolist()
        release_gathered(self.model)
        counts_ME = None
        if routing.counts_ME is not None:
            counts_ME = self._with_weights(self.ranks.sum_over_world(routing.counts_ME))
        return Evaluation(total[0], int(total[1]), counts_ME)

    def request(self, request: Request) -> None:
        """Ask for a stop or a save; every rank sees it in the same step's report, whichever rank asked."""
        self._requested.add(request)

    def anticipate(self) -> None:
        """Route by anticipated choices for a while from the next step on, or for longer. Every rank must call it.

        Raises:
            ValueError: ``stability.anticipation.kind`` is not triggered.
        """
        technique = self.techniques["anticipation"]
        if not isinstance(technique, TriggeredAnticipation):
            raise ValueError("stability.anticipation.kind is not triggered, so there is nothing to start")
        technique.trigger(self.steps_done)

    def forget_batches(self) -> None:
        """Coming batches are others than they were: drop what was made of them in advance. Every rank must call it."""
        technique = self.techniques["anticipation"]
        if isinstance(technique, Anticipation):
            technique.drop()

    def state(self) -> TrainingState:
        """Everything that makes the next step what it is, by name. Tensors are live: save copies, load in place."""
        scalars: dict[str, int] = {"steps_done": self.steps_done, "updates": self.optimizer.taken}
        return collect_state(
            self.model, self.parameters, self.optimizer, self.techniques, self.detector, self.ranks, scalars
        )

    def restore(self, scalars: Mapping[str, int]) -> None:
        """Take over the scalars of a saved state whose tensors have been filled in place."""
        self.steps_done = scalars["steps_done"]
        self.optimizer.restore(scalars["updates"])


def _predicted(batch: Batch, length: int, shift: int) -> int:
    """Positions of ``batch`` that are real, and so are the ``shift`` tokens after them."""
    if batch.real_BL is None:
        return batch.ids_BL.shape[0] * length
    return int((counted_targets(batch, length, shift) != -100).sum())
