"""How an option is declared: a dataclass field with its documentation and its bounds."""

from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    text: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its documentation and its bounds (`low`/`high` inclusive, `above`/`below` exclusive)."""
    metadata = {"text": text, "low": low, "high": high, "above": above, "below": below}
    if isinstance(default, dict | list):
        raise TypeError("option defaults are immutable: use a tuple")
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)
