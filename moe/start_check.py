"""Do activations and logits start where the config says? One forward before the first step tells.

A model whose start is off by a factor trains, only worse: its router is nearly fixed or nearly even from the first
step, or its loss begins far above log V. The figures that follow from the config alone are compared.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.batch import Batch
from moe.config.model import ModelConfig
from moe.model import Transformer
from moe.monitors import Measurements, measure
from moe.parallel import Ranks

TOLERATED = 2.0
"""Largest ratio of what is measured and what follows from the config, either way."""

# A mean square of n independent normal numbers is off by a factor of 4 (its root by 2) with a probability below 1e-9
# from n = 64 on; with fewer it says little.
_ENOUGH = 64


@dataclass(frozen=True)
class ExpectedStart:
    """Root mean squares that follow from the config, whatever the batch."""

    embedding_rms: float
    """Of token embeddings."""
    router_gain: float
    """Of router logits, for router inputs of 1."""
    head_gain: float
    """Of the next token's logits, for inputs of the head of 1."""


def expected_start(config: ModelConfig) -> ExpectedStart:
    """A product of D independent weights of std s with an input of root mean square r has the std ``s sqrt(D) r``."""
    gain = config.init.std * math.sqrt(config.hidden_size)
    return ExpectedStart(config.init.embedding_std or config.init.std, gain, gain)


def check_start(model: Transformer, batch: Batch, ranks: Ranks) -> Measurements:
    """Measure a model whose weights have just been drawn on this rank's ``batch``. Collective; every rank ends alike.

    Raises:
        ValueError: a figure is not finite, or more than twice or less than half of what the config says; one line that
            names the layer and the figure.
    """
    measured = measure(model, batch, ranks)
    for figure in _figures(model.config, measured):
        if not math.isfinite(figure.found):
            raise ValueError(f"{figure.name} is {figure.found} before the first step")
        if figure.is_elsewhere:
            raise ValueError(
                f"{figure.name} is {figure.found:.3g} before the first step, but model.init.{figure.source} gives "
                f"{figure.expected:.3g}; model.init.check=false trains all the same"
            )
    return measured


@dataclass(frozen=True)
class _Figure:
    """One measured figure and, where there is one, its expected value and the option that it follows from."""

    name: str
    found: float
    expected: float | None = None
    source: str = ""
    numbers: float = 0.0
    """Independent normal numbers in it."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is off by more than chance and tolerance explain."""
        if self.expected is None or self.numbers < _ENOUGH:
            return False
        return not self.expected / TOLERATED <= self.found <= self.expected * TOLERATED


def _figures(config: ModelConfig, measured: Measurements) -> Iterator[_Figure]:
    """In the order in which a forward comes to them."""
    expected, std = expected_start(config), f"std={config.init.std}"
    embedding, moe_layers = measured.embedding, {moe.layer: moe for moe in measured.moe}
    source = std if config.init.embedding_std is None else f"embedding_std={config.init.embedding_std}"
    numbers = embedding.directions * config.hidden_size
    yield _Figure("the RMS of the embedding", embedding.rms, expected.embedding_rms, source, numbers)
    for layer, residual_rms in enumerate(measured.residual_rms):
        name = f"layer {layer}" if layer < config.num_layers else "the multi-token prediction block"
        if layer in moe_layers:
            moe = moe_layers[layer]
            gain, numbers = expected.router_gain, moe.router_input.directions * config.moe.router_outputs
            wanted = gain * moe.router_input.rms
            yield _Figure(f"the RMS of the router logits of {name}", moe.router_logit_rms, wanted, std, numbers)
            yield _Figure(f"the kurtosis of the experts' activation in {name}", moe.expert_kurtosis)
        yield _Figure(f"the largest attention logit of {name}", measured.attention_logit_max[layer])
        yield _Figure(f"the RMS of the residual stream after {name}", residual_rms)
    head, numbers = measured.head_input, measured.head_input.directions * (config.vocab_size or 0)
    yield _Figure("the RMS of the logits", measured.logit_rms, expected.head_gain * head.rms, std, numbers)
