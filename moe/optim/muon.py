"""Muon for the matrices inside the blocks, AdamW for everything else (DeepSeek-V4 report).

Shape legend: N matrices of one parameter, R rows, C columns.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from moe.config.optimizer import MuonConfig
from moe.optim.adamw import MOMENT_DTYPES, AdamW
from moe.optim.newton_schulz import orthogonalise
from moe.optim.optimizer import Optimizer
from moe.parallel import Ranks
from moe.parameters import Parameter
from moe.shards import held_rows, on_whole_matrices
from moe.units import Units

_MATRICES = {
    ".attention.q_proj.weight": 1,
    ".attention.q_proj.0.weight": 1,
    ".attention.q_proj.2.weight": 1,
    ".attention.k_proj.weight": 1,
    ".attention.v_proj.weight": 1,
    ".attention.kv_down.weight": 1,
    ".attention.kv_up.weight": 1,
    ".attention.out_proj.weight": 1,
    ".gate_up.weight": 2,
    ".down.weight": 1,
    ".experts.w_up": 2,
    ".experts.w_down": 1,
    "mtp.project.weight": 1,
}
"""End of a parameter's name -> matrices that are stacked in its rows (of every expert's). All heads are one matrix."""

_NEVER = "connection"
"""Mappings between residual streams: small, and DeepSeek-V4 leaves their gates and offsets to AdamW."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stacked_matrices(name: str) -> int:
    """How many matrices Muon sees in the rows of a parameter; 0 says that it is AdamW's.

    What is not known as a matrix is AdamW's, so that nothing is orthogonalised by accident.
    """
    if _NEVER in name:
        return 0
    return next((stacked for end, stacked in _MATRICES.items() if name.endswith(end)), 0)


class Muon(Optimizer):
    """``M <- mu M + G``; ``O = orthogonal(mu M + G) sqrt(max(R, C)) gamma``; ``W <- W (1 - lr wd) - lr O``.

    Every expert, and each of what is stacked in one parameter (gate over up), is a matrix of its own. A matrix of full
    rank has an update whose root mean square is gamma, whatever its shape.

    Experts are updated where they are, replicated matrices on every rank (to the same bits), sharded ones each on one
    rank, which gets the whole matrix and sends the rows of the update back.

    The size of a gradient does not matter, so an expert that gets no token goes on in the direction of its momentum by
    whole steps, until that has faded to 0 or tokens come; one that never had a gradient decays, and does not move.
    """

    def __init__(self, parameters: Sequence[Parameter], config: MuonConfig, ranks: Ranks) -> None:
        """Collective."""
        self.config = config
        self.taken = 0
        mine = [p for p in parameters if stacked_matrices(p.name)]
        self._whole = [p for p in mine if p.placement != "sharded"]
        # By size, so that the matrices of one round keep their ranks busy for about as long.
        self._sharded = sorted((p for p in mine if p.placement == "sharded"), key=lambda p: -p.handle.numel())
        self._ranks, self._rows_PW = ranks, held_rows(self._sharded, ranks)
        others = [p for p in parameters if not stacked_matrices(p.name)]
        self._adamw = AdamW(others, config, Units(others, ranks))
        dtype = MOMENT_DTYPES[config.moments]
        self.momentum = {p.name: torch.zeros_like(p.local, dtype=dtype) for p in mine}

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        """One update with learning rate ``lr`` from the parameters' gradients; returns AdamW's figures. Collective."""
        figures = self._adamw.step(lr)
        for p in self._whole:
            self._move(p, self._orthogonal(p, self._direction(p)), lr)
        updates = on_whole_matrices(self._directions(), self._rows_PW, self._ranks, self._orthogonal_of_index)
        for p, update in zip(self._sharded, updates, strict=True):
            self._move(p, update, lr)
        self.taken += 1
        return figures

    def _directions(self) -> Iterator[torch.Tensor]:
        return (self._direction(p) for p in self._sharded)

    def _direction(self, p: Parameter) -> torch.Tensor:
        """``mu M + G`` after this step's gradient, which goes into ``M``; fp32, before M is rounded to what is kept."""
        mu, kept, gradient = self.config.momentum, self.momentum[p.name], p.gradient
        momentum = torch.add(gradient, kept.float(), alpha=mu)
        kept.copy_(momentum)
        return torch.add(gradient, momentum, alpha=mu)

    def _orthogonal_of_index(self, index: int, whole: torch.Tensor) -> torch.Tensor:
        return self._orthogonal(self._sharded[index], whole)

    def _orthogonal(self, p: Parameter, direction: torch.Tensor) -> torch.Tensor:
        """The update of whole matrices from their direction, in its shape."""
        rows, columns = direction.shape[-2] // stacked_matrices(p.name), direction.shape[-1]
        update_NRC = orthogonalise(direction.view(-1, rows, columns), _DTYPES[self.config.newton_schulz_dtype])
        return update_NRC.mul_(self.config.update_rms * max(rows, columns) ** 0.5).reshape(direction.shape)

    def _move(self, p: Parameter, update: torch.Tensor, lr: float) -> None:
        p.local.mul_(1 - lr * self.config.weight_decay).sub_(update, alpha=lr)

    def moments(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """``momentum`` of the matrices; ``exp_avg`` and ``exp_avg_sq`` of the others."""
        return {"momentum": self.momentum, **self._adamw.moments()}

    def restore(self, taken: int) -> None:
        """Continue ``taken`` updates after moments of 0 (the moments are filled in place by whoever restores them)."""
        super().restore(taken)
        self._adamw.restore(taken)
