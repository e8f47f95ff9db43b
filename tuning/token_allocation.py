"""How compute is spread over tokens: more than by chance, and on which of them.

Shape legend: T validation tokens, in the same order for every run on the same text.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from moe.config.model import ModelConfig

_TENTHS = 10


def picks_of(model: ModelConfig) -> int:
    """Independent picks that a token's real experts are compared with, over all MoE layers.

    Of the choices that a token has, each may fall on a real expert; with thresholds every expert may be taken or not.
    """
    picks = model.moe.num_experts if model.moe.selection.kind == "threshold" else model.moe.top_k
    return picks * sum(model.is_moe_layer(layer) for layer in range(model.num_layers))


def spread(experts_T: npt.NDArray[np.int32], choices: int) -> float:
    """Standard deviation of real experts over tokens, over that of a binomial of the same mean.

    ``choices`` is the largest number of real experts, all layers together: the binomial's trials. 1 is what skipping at
    random gives; 0 where every token has the same number.
    """
    share = float(experts_T.mean()) / choices
    variance = choices * share * (1 - share)
    return float(experts_T.std()) / math.sqrt(variance) if variance > 0 else 0.0


def complexity(
    ids_T: npt.NDArray[np.int32], experts_T: npt.NDArray[np.int32], losses_T: npt.NDArray[np.float32]
) -> float:
    """Spearman correlation of real experts with the loss, inside tenths of tokens of like frequency, averaged.

    A rare token has a loss and an embedding of its own, so that over all tokens frequency alone correlates the two.
    Tokens are put in order of how often theirs occurs and cut into ten parts of nearly equal size, the occurrences of
    a token together; parts without any variation count as 0, and each part by its size.
    """
    total = 0.0
    for part_P in _parts_of_like_frequency(ids_T):
        experts, losses = experts_T[part_P], losses_T[part_P]
        if np.ptp(experts) > 0 and np.ptp(losses) > 0:
            total += len(part_P) * float(spearmanr(experts, losses).statistic)
    return total / len(ids_T)


def _parts_of_like_frequency(ids_T: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    _, kind_T, counts = np.unique(ids_T, return_inverse=True, return_counts=True)
    by_frequency = np.argsort(-counts, kind="stable")
    # A token belongs where the middle of its occurrences lies.
    ends = counts[by_frequency].cumsum()
    middle = (ends - counts[by_frequency] / 2) / len(ids_T)
    part = np.empty(len(counts), np.int64)
    part[by_frequency] = np.minimum((middle * _TENTHS).astype(np.int64), _TENTHS - 1)
    part_T = part[kind_T]
    return [found for number in range(_TENTHS) if len(found := np.flatnonzero(part_T == number))]
