"""How uneven the load of a batch is when no expert is preferred: the MaxVio that chance alone leaves."""

from functools import lru_cache

import numpy as np

_DRAWS = 2000


@lru_cache(maxsize=256)
def noise_floor(experts: int, top_k: int, tokens: int) -> float:
    """Expected MaxVio, ``max load / mean load - 1``, of one layer where every token takes ``top_k`` distinct experts.

    Each set of ``top_k`` out of ``experts`` is as likely as any other. The mean of 2000 draws from one seed, so
    its own error is under 1 %. MaxVio that is a mean over layers has the same floor, for each layer routes all tokens.
    """
    # Experts are gone through one by one. A token that still needs r of the n experts left takes the next one with
    # probability r/n, which makes every set equally likely (Knuth, algorithm S); so all tokens with the same r are one
    # binomial draw, and the cost does not depend on their number.
    generator = np.random.default_rng(0)
    waiting_DR = np.zeros((_DRAWS, top_k + 1), dtype=np.int64)  # tokens of each draw that need 0, 1, ... top_k more
    waiting_DR[:, top_k] = tokens
    needed_R = np.arange(top_k + 1)
    busiest_D = np.zeros(_DRAWS, dtype=np.int64)
    for left in range(experts, 0, -1):
        taking_DR = generator.binomial(waiting_DR, np.minimum(needed_R / left, 1.0))
        waiting_DR -= taking_DR
        waiting_DR[:, :-1] += taking_DR[:, 1:]
        busiest_D = np.maximum(busiest_D, taking_DR.sum(axis=1))
    return float(busiest_D.mean() * experts / (tokens * top_k) - 1)


@lru_cache(maxsize=256)
def varying_noise_floor(experts: int, mean_experts: float, tokens: int) -> float:
    """The same where a token's number of experts varies: it takes each with probability ``mean_experts / experts``.

    That is random routing by thresholds exactly. Beside identity experts, of which there is a fixed number of choices
    in all, loads differ a little less, the less the more identities are chosen.
    """
    generator = np.random.default_rng(0)
    load_DE = generator.binomial(tokens, mean_experts / experts, size=(_DRAWS, experts))
    return float(load_DE.max(axis=1).mean() * experts / (tokens * mean_experts) - 1)
