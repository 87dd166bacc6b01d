"""The base of every config."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

MOST_SIDE = 256
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
"""Height or width of a token grid."""


class Frozen(BaseModel):
    """Immutable, closed to unknown names, self-documenting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def edited(self, **changes: Any) -> Self:
        """A validated copy with changes (pydantic's own `model_copy` does not validate)."""
        return type(self).model_validate({**self.model_dump(), **changes})
