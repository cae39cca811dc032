"""Independent random streams from one run seed: one generator per purpose, named by a path.

A stream depends on the seed and its path alone, never on which other streams were drawn before, so a device can
redo any round of any run on its own. Nothing in fedbpt touches numpy's global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedbpt.errors import InputError


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """A PCG64 generator for the purpose that ``path`` names, e.g. ``generator(7, "batch", "pi5", 12)``.

    The bit generator is named here and never numpy's default, which may change between releases.

    Raises:
        InputError: a negative seed, an empty path, or a path element that is neither str nor int.
    """
    words = np.frombuffer(_path_digest(seed, path), dtype="<u4")
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=tuple(int(word) for word in words))
    return np.random.Generator(np.random.PCG64(sequence))


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for whoever needs a seed of its own rather than a generator (a device's local search)."""
    message = str(seed).encode() + b"/" + _path_digest(seed, path)
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


def _path_digest(seed: int, path: tuple[str | int, ...]) -> bytes:
    """sha256 of the path. Type and length go before each part, so that no two paths read the same."""
    if seed < 0:
        raise InputError(f"a seed must be 0 or more, got {seed}")
    if not path:
        raise InputError("a random stream needs a path that says what it is for")
    digest = hashlib.sha256()
    for part in path:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise InputError(f"a random stream's path holds str and int only, got {part!r}")
        text = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(text)}:".encode())
        digest.update(text)
    return digest.digest()
