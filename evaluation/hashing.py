"""One canonical hash for everything that is named by its content."""

from typing import Any

from pipeline.code_dataset.layout import canonical_json, sha256_hex


def canonical_hash(content: Any) -> str:
    """sha-256 (hex) of the canonical JSON of plain values. Infinite numbers and NaN are refused with ValueError."""
    return sha256_hex(canonical_json(content))
