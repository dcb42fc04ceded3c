"""Files from the web, and their hashes."""

import hashlib
import urllib.request

TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 20


def fetch(url: str, path: str) -> None:
    """Copies what an http(s) address holds into a local file. Raises OSError when that fails, or nothing comes for a minute."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(path, "wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)


def file_sha256(path: str) -> str:
    """sha-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
