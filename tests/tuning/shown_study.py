"""A small study whose trials have shown what a test says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuning.results import Results, TrialKey, TrialResult
from tuning.study_config import Claim, StudyConfig
from tuning.verdict import ClaimVerdict, ConditionVerdict, Verdict

RATES = [0.001, 0.003, 0.01]
Measured = Callable[[TrialKey], Mapping[str, float]]


def study(arms: Sequence[str], shown: Sequence[str], grid: bool = False, **keys: Any) -> StudyConfig:
    left = {"arm": arms[0], "measure": "val_loss", **({"over": {"kind": "mean"}} if grid else {})}
    tree: dict[str, Any] = {
        "title": "Does it help?",
        "question": "Whether it helps.",
        "base": ["micro"],
        "arms": {arm: {"says": f"what {arm} is"} for arm in arms},
        "shown": list(shown),
        "claims": [{"name": "T1", "says": "it helps", "conditions": [{"left": left, "relation": "below", "right": 9}]}],
    }
    if grid:
        tree["grid"] = {"key": "optimizer.lr", "values": RATES}
    return StudyConfig.model_validate(tree | keys)


def results(config: StudyConfig, seeds: int, measured: Measured) -> Results:
    keys = [TrialKey(seed, arm, point) for seed in range(seeds) for arm in config.arms for point in config.points()]
    return Results([TrialResult(key, measured(key)) for key in keys], config.arms, config.points())


def verdict(name: str, says: Verdict, *sentences: str, reason: str = "") -> ClaimVerdict:
    condition = {"left": {"arm": "a", "measure": "val_loss"}, "relation": "below", "right": 9.0}
    claim = Claim.model_validate({"name": name, "says": f"the claim {name}", "conditions": [condition]})
    return ClaimVerdict(claim, says, tuple(ConditionVerdict(says, sentence) for sentence in sentences), reason)
