"""Base class of all configuration sections."""

from pydantic import BaseModel, ConfigDict


class ConfigBase(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
