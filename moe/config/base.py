"""What every config class shares: frozen, closed to unknown keys, documented field by field."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all config classes.

    Unknown keys are refused rather than ignored (a misspelt switch that silently does nothing costs a run), values
    cannot change after validation, NaN or infinity is never a valid number, and nothing is converted: ``yes`` is no 1
    and ``"4"`` no 4, though an integer may stand for a float.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        strict=True,
        use_attribute_docstrings=True,
    )
