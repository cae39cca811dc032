"""Independent random streams derived from a run's seed: one generator per purpose, named by a path.

A stream depends only on the seed and its path, not on what was drawn before, so a device can repeat any round of any
run on its own. fedbpt never uses numpy's global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedbpt.errors import InputError


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """A PCG64 generator for the purpose named by ``path``, e.g. ``generator(7, "batch", "pi5", 12)``.

    PCG64 is set explicitly, as numpy's default may change between releases.

    Raises:
        InputError: a negative seed, an empty path, or a path element that is neither str nor int.
    """
    words = np.frombuffer(_path_digest(seed, path), dtype="<u4")
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=tuple(int(word) for word in words))
    return np.random.Generator(np.random.PCG64(sequence))


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed, for code that needs a seed rather than a generator (a device's local search)."""
    message = str(seed).encode() + b"/" + _path_digest(seed, path)
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


def _path_digest(seed: int, path: tuple[str | int, ...]) -> bytes:
    """SHA-256 of the path. Each part is prefixed by its type and length, so that no two paths collide."""
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}", field="seed")
    if not path:
        raise InputError("path is empty: name what the random stream is for", field="path")
    digest = hashlib.sha256()
    for part in path:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise InputError(f"path must hold str and int only, got {part!r}", field="path")
        text = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(text)}:".encode())
        digest.update(text)
    return digest.digest()
