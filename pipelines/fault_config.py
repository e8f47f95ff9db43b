"""Faults that a run is given on purpose, so that what protects against them can be compared. ``faults``.

Imports pydantic and nothing heavier.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from moe.config.base import Config

Share = Annotated[float, Field(gt=0, le=1)]


class CorruptedBatchesConfig(Config):
    """Optimizer steps whose whole global batch is spoiled.

    Seed, step and place in the list decide which; a larger share hits the steps of a smaller one and others. Text that
    is held out stays as it is.
    """

    kind: Literal["corrupted_batches"] = "corrupted_batches"
    share: Share
    """Share of the optimizer steps that are hit: each by itself, so it is met on average."""
    content: Literal["repeated_ngram", "shuffled_tokens"] = "repeated_ngram"
    """repeated_ngram replaces each sequence by its own first tokens, over and over: such text made the gradient spike
    where OLMo 2 (arXiv 2501.00656) had not filtered it. shuffled_tokens puts a sequence's tokens in a random order."""
    ngram_tokens: PositiveInt = 4
    """Tokens that repeated_ngram repeats."""
    from_step: PositiveInt = 1
    """The first optimizer step that may be hit, counted from 1."""

    @field_validator("ngram_tokens")
    @classmethod
    def _ngram_is_used(cls, ngram_tokens: int, info: ValidationInfo) -> int:
        # By value, since a written config that is read back has every key.
        default = cls.model_fields["ngram_tokens"].default
        if info.data.get("content") == "shuffled_tokens" and ngram_tokens != default:
            raise ValueError("has no effect, since content is shuffled_tokens; leave it out")
        return ngram_tokens


# The next fault makes this a union discriminated by ``kind``, as the families in moe.config.stability are.
FaultConfig = CorruptedBatchesConfig


def fault_problem(fault: FaultConfig, steps: int, shortest_sequence: int) -> str | None:
    """Why a fault does nothing in a run of so many optimizer steps: the key, and what is wrong; None if it does."""
    if fault.from_step > steps:
        return f"from_step ({fault.from_step}) is after the last of the schedule's {steps} optimizer steps"
    if fault.content == "repeated_ngram" and 2 * fault.ngram_tokens > shortest_sequence:
        return f"ngram_tokens ({fault.ngram_tokens}) does not fit twice into a sequence of {shortest_sequence} tokens"
    return None
