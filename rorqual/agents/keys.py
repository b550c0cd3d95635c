"""Keys of calls as a sandbox knows them. The key of a call itself is `rorqual.journal.call_key`."""

from __future__ import annotations

import hashlib

from rorqual.journal.keys import KEY_BYTES


def attempt_key(key: str, generation: int) -> str:
    """The key a call has in the sandbox once its state was taken back `generation` times.

    The sandbox remembers what ran before it was taken back; under the old key it would answer for a state that is gone.
    """
    if generation == 0:
        return key
    return hashlib.sha256(f"{key}|generation {generation}".encode()).digest()[:KEY_BYTES].hex()
