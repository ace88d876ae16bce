"""What all sections of the configuration have in common: unknown options and booleans for numbers are refused."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this, `lr: yes` is a learning rate of 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float, float | None):
            raise ValueError("expected a number")
        return value
