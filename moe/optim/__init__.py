"""Optimizers, and the one that a config names."""

from typing import assert_never

from moe.config.optimizer import AdamwConfig, MuonConfig, OptimizerConfig
from moe.optim.adamw import AdamW
from moe.optim.muon import Muon
from moe.optim.optimizer import Optimizer
from moe.parameters import ParameterSet
from moe.units import Units

__all__ = ["AdamW", "Muon", "Optimizer", "build_optimizer"]


def build_optimizer(config: OptimizerConfig, parameters: ParameterSet) -> Optimizer:
    """The optimizer that ``optimizer.kind`` names. Collective."""
    match config:
        case AdamwConfig():
            return AdamW(parameters.all, config, Units(parameters.all, parameters.ranks))
        case MuonConfig():
            return Muon(parameters.all, config, parameters.ranks)
        case other:
            assert_never(other)
