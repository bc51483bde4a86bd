"""What every section of a recipe is made of: the base class, and the types that several share. No torch."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# A hub id has no ~, so one type serves for what may be either.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """Base of every section: immutable, strict types, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
