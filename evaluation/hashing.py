"""One canonical hash for everything that is named by its content."""

import hashlib
import json
from typing import Any


def canonical_hash(content: Any) -> str:
    """sha-256 (hex) of the canonical JSON of plain values. Infinite numbers and NaN are refused with ValueError."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
