"""Randomness as an argument: a generator for every key, no global state.

Any draw of this package comes from ``generator_for(seed, epoch, data set, sample key)``, so it
does not depend on the process, the worker or what was drawn before it.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator_for(*key: str | int) -> np.random.Generator:
    """Return the generator that belongs to ``key``, equal in every process.

    The parts are joined unambiguously (``("a", "bc")`` and ``("ab", "c")`` differ) and hashed to
    Philox's 128-bit key, which makes creation cheap and streams independent.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
