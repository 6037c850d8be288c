"""The base of every frozen specification, and the bounded number types they are made of.

A specification is configuration, validation and behaviour in one: TOML decodes straight into it, wrong
values are refused while decoding, and methods on it say how the thing behaves.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]


class SpecError(ValueError):
    """A specification that is well formed but makes no sense; the message says what would be valid."""


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen, hashable, comparable record. Unknown keys are refused while decoding."""

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, validated like a freshly decoded one."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__} | changes
        copy = type(self)(**fields)
        return msgspec.convert(msgspec.to_builtins(copy), type(copy))
