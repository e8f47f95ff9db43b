"""Health of a model, measured in one forward of one micro-batch without gradients.

Hooks do the measuring. They stand on the modules during that one forward alone, so training neither pays for them nor
changes by a bit. Padding never counts.

Shape legend: B sequences, S positions, T = B*S tokens, D model width, H heads, P (token, expert) pairs, F expert width,
N residual streams.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from moe.attention_logits import watch_logits
from moe.batch import Batch
from moe.fsdp import release_gathered
from moe.layers.dispatch import dispatch_combine
from moe.layers.hyper_connections import HyperConnection
from moe.layers.moe import MoeLayer
from moe.layers.router import Routing
from moe.layers.selection import real_choices
from moe.model import Transformer
from moe.parallel import Ranks


@dataclass(frozen=True)
class Inputs:
    """Vectors that a matrix reads, over all ranks."""

    rms: float
    """Root mean square."""
    directions: float
    """How many directions they are spread over: ``tr(G)^2 / tr(G^2)`` with G the mean of x x^T, averaged over ranks."""


@dataclass(frozen=True)
class MoeMeasurements:
    """One MoE layer."""

    layer: int
    """The number of its block."""
    router_input: Inputs
    router_logit_rms: float
    expert_max: float
    """Largest absolute activation of a routed expert: what its down-projection reads, before the gate."""
    expert_kurtosis: float
    """Fourth central moment of those activations over their squared variance; 3 for a normal distribution."""


@dataclass(frozen=True)
class Measurements:
    """Host numbers, the same on every rank. Blocks are in order, the multi-token prediction block's last."""

    embedding: Inputs
    residual_rms: tuple[float, ...]
    """Root mean square of the residual stream after each block."""
    attention_logit_max: tuple[float, ...]
    """Largest attention logit of each block, over heads, real queries and what they attend to; after the scale."""
    moe: tuple[MoeMeasurements, ...]
    """One entry per MoE layer; empty for a dense model."""
    head_input: Inputs
    logit_rms: float
    """Root mean square of the next token's logits."""
    residual_gain: tuple[float, float] | None = None
    """Smallest and largest gain of the residual streams from the first block to the last, None for a plain residual:
    absolute row and column sums of the product of all B of a token (hyper-connections), over real tokens. Row sums are
    what equal streams are multiplied by, column sums what equal gradients are. 1 is a stream that is passed on."""

    def headline(self) -> dict[str, float]:
        """What should not grow, the largest over the layers, and what should stay near 1, by the metric's name."""
        metrics = {
            "activation/residual_rms": max(self.residual_rms),
            "attention/logit_max": max(self.attention_logit_max),
        }
        if self.moe:
            metrics["activation/expert_max"] = max(layer.expert_max for layer in self.moe)
            metrics["activation/expert_kurtosis"] = max(layer.expert_kurtosis for layer in self.moe)
        if self.residual_gain is not None:
            metrics["activation/residual_gain_min"], metrics["activation/residual_gain_max"] = self.residual_gain
        return metrics

    def by_layer(self) -> dict[str, float]:
        """The same figures of every block, by the name of the metric; one quantity's layers share a prefix."""
        metrics = {f"activation_residual_rms/layer_{i:02}": rms for i, rms in enumerate(self.residual_rms)}
        metrics |= {f"attention_logit_max/layer_{i:02}": logit for i, logit in enumerate(self.attention_logit_max)}
        for moe in self.moe:
            metrics[f"activation_expert_max/layer_{moe.layer:02}"] = moe.expert_max
            metrics[f"activation_expert_kurtosis/layer_{moe.layer:02}"] = moe.expert_kurtosis
        return metrics


@dataclass
class _Gathered:
    """What this rank sees, on the device until the forward is over. All ranks have the same names in the same order."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    real_BS: torch.Tensor | None = None
    """Which positions count in the block that is running."""
    product_TNN: torch.Tensor | None = None
    """Of every B so far, the last one to the left, of tokens that count."""

    def squares(self, name: str, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Sum of squares and number of the values of vectors [..., N] that count; returns those vectors [T, N]."""
        rows = _counted(x, real).float()
        self.sums[name] = torch.stack((rows.square().sum(dtype=torch.float64), _number(rows.numel(), rows)))
        return rows

    def inputs(self, name: str, x: torch.Tensor, real: torch.Tensor | None) -> None:
        """Of vectors [..., N] that a matrix reads."""
        rows = self.squares(name, x, real)
        # The same trace from the smaller of the two products. 1 rather than 0 / 0 for no vectors.
        gram = rows @ rows.t() if rows.shape[0] < rows.shape[1] else rows.t() @ rows
        square = gram.square().sum(dtype=torch.float64)
        trace = rows.square().sum(dtype=torch.float64)
        spread = torch.where(square > 0, trace.square() / square, 1.0)
        self.sums[f"{name}.directions"] = torch.stack((spread, _number(1, rows)))

    def reduce(self, ranks: Ranks) -> dict[str, list[float]]:
        """Over all ranks: sums as they are, maxima as lists of one. Collective."""
        sums = ranks.sum_over_world(torch.cat(list(self.sums.values()))).split([len(s) for s in self.sums.values()])
        maxima = ranks.max_over_world(torch.stack(list(self.maxima.values())))
        found = {name: part.tolist() for name, part in zip(self.sums, sums, strict=True)}
        return found | {name: [value] for name, value in zip(self.maxima, maxima.tolist(), strict=True)}


def _number(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=like.device)


def _counted(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The vectors [..., N] at positions that count -> [T, N]."""
    rows = x.flatten(0, -2)
    return rows if real is None else rows[real.flatten()]


@torch.no_grad()
def measure(model: Transformer, batch: Batch, ranks: Ranks) -> Measurements:
    """Measure ``model`` on this rank's micro-batch; the figures are those of all ranks' micro-batches. Collective.

    Neither weights, gradients nor the count of bytes on the wire change. Takes one forward without gradients, and once
    more its attention products, dispatch and up-projections.
    """
    gathered = _Gathered()
    with _hooked(model, batch, gathered), ranks.wire.uncounted():
        output = model(batch)
    length = output.logits.shape[1]
    _gain_of(gathered)
    gathered.squares("logits", output.logits, None if batch.real_BL is None else batch.real_BL[:, :length])
    release_gathered(model)
    return _measurements(model, gathered.reduce(ranks))


@contextmanager
def _hooked(model: Transformer, batch: Batch, gathered: _Gathered) -> Iterator[None]:
    """Stands hooks on the modules that are measured, and takes them away in any case."""
    length = batch.ids_BL.shape[1] - 1 - model.config.mtp.depth
    real = None if batch.real_BL is None else batch.real_BL[:, :length]

    def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        gathered.real_BS = args[1].real_BS

    handles: list[RemovableHandle] = [
        model.embed.register_forward_hook(lambda _, args, y: gathered.inputs("embedding", y[:, :length], real)),
        model.norm.register_forward_hook(lambda _, args, y: gathered.inputs("head", y, real)),
    ]
    handles += watch_logits(model.blocks(), partial(_see_logits, gathered))
    for layer, block in enumerate(model.blocks()):
        handles.append(block.register_forward_pre_hook(enter))
        if isinstance(block.ffn, MoeLayer):
            handles.append(block.ffn.register_forward_hook(partial(_after_moe, gathered, layer)))
        for residual in (block.attention_residual, block.ffn_residual):
            if isinstance(residual, HyperConnection) and layer < model.config.num_layers:
                handles.append(residual.register_forward_hook(partial(_after_connection, gathered)))
        handles.append(block.register_forward_hook(partial(_after_block, gathered, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after_block(gathered: _Gathered, layer: int, module: torch.nn.Module, args: Any, output: Any) -> None:
    gathered.squares(f"residual.{layer}", output[0].flatten(2), gathered.real_BS)


def _after_connection(gathered: _Gathered, module: HyperConnection, args: Any, output: Any) -> None:
    """Take the factors again; the forward keeps them to itself."""
    b_NNT = module.mappings(_counted(args[0].flatten(2), gathered.real_BS).unflatten(1, args[0].shape[2:]))[1]
    b_TNN = b_NNT.permute(2, 0, 1).double()
    gathered.product_TNN = b_TNN if gathered.product_TNN is None else b_TNN @ gathered.product_TNN


def _gain_of(gathered: _Gathered) -> None:
    if gathered.product_TNN is None:
        return
    sums = torch.cat([gathered.product_TNN.sum(dim=dim).flatten() for dim in (1, 2)]).abs()
    nothing = sums.new_full((1,), float("-inf"))
    gathered.maxima["gain"] = torch.cat((sums, nothing)).amax()
    gathered.maxima["gain.least"] = torch.cat((-sums, nothing)).amax()


def _see_logits(gathered: _Gathered, layer: int, largest_H: torch.Tensor) -> None:
    gathered.maxima[f"attention.{layer}"] = largest_H.amax().double()


def _after_moe(gathered: _Gathered, layer: int, module: MoeLayer, args: Any, output: tuple[Any, Routing]) -> None:
    """Send the real tokens to their experts again, up to the activation: experts do not know what is padding."""
    routing, real_T = output[1], output[1].real_T
    x_TD = _counted(args[0], real_T)
    gathered.inputs(f"router_input.{layer}", x_TD, None)
    gathered.squares(f"router_logits.{layer}", routing.logits_TE, real_T)
    choices_TK = real_choices(routing.ids_TK, module.router.config)
    ids_TK, gates_TK = (x if real_T is None else x[real_T] for x in (choices_TK, routing.gates_TK))

    def watch(rows: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        a_PF = module.experts.activations(rows, ids).double()
        square_PF = a_PF.square()
        moments = [a_PF.sum(), square_PF.sum(), (square_PF * a_PF).sum(), square_PF.square().sum()]
        gathered.sums[f"activation.{layer}"] = torch.stack((*moments, _number(a_PF.numel(), a_PF)))
        gathered.maxima[f"activation.{layer}.max"] = a_PF.abs().amax() if a_PF.numel() else a_PF.new_zeros(())
        return torch.zeros_like(rows)

    run_experts: Callable[..., torch.Tensor] = watch
    dispatch_combine(x_TD, ids_TK, gates_TK, module.experts.num_experts, run_experts, module.ranks, module.row_codec)


def _measurements(model: Transformer, found: dict[str, list[float]]) -> Measurements:
    def rms(name: str) -> float:
        square, number = found[name]
        return float((square / max(1.0, number)) ** 0.5)

    def inputs(name: str) -> Inputs:
        spread, ranks = found[f"{name}.directions"]
        return Inputs(rms(name), spread / ranks)

    def largest(name: str) -> float:
        value = found[name][0]
        return 0.0 if value == float("-inf") else value  # nothing real on any rank

    layers = range(len(model.blocks()))
    return Measurements(
        inputs("embedding"),
        tuple(rms(f"residual.{layer}") for layer in layers),
        tuple(largest(f"attention.{layer}") for layer in layers),
        tuple(
            MoeMeasurements(
                layer,
                inputs(f"router_input.{layer}"),
                rms(f"router_logits.{layer}"),
                found[f"activation.{layer}.max"][0],
                _kurtosis(*found[f"activation.{layer}"]),
            )
            for layer in layers
            if f"activation.{layer}" in found
        ),
        inputs("head"),
        rms("logits"),
        (-largest("gain.least"), largest("gain")) if "gain" in found else None,
    )


def _kurtosis(s1: float, s2: float, s3: float, s4: float, number: float) -> float:
    """From sums of powers; 0 where all values are one."""
    if number == 0:
        return 0.0
    mean, m2, m3, m4 = s1 / number, s2 / number, s3 / number, s4 / number
    variance = m2 - mean**2
    fourth = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
    return fourth / variance**2 if variance != 0 else 0.0
