"""Config classes of the ground floor. This package imports pydantic and nothing heavier."""
