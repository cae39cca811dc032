"""Keys and streams of secure aggregation, by the ``cryptography`` package: X25519, HKDF, ChaCha20, Ed25519."""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import MissingExtraError, WireError

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise MissingExtraError("secure aggregation", "secure") from error

KEY_BYTES = 32


def new_key() -> bytes:
    """A random private key, for X25519 or Ed25519, or a seed."""
    return secrets.token_bytes(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of ``private``."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """The key that two devices derive from each other's public key for ``purpose``. Raises `WireError` for no key."""
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise WireError("a public key is no X25519 key: begin another epoch", field="keys") from error
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(shared)


def stream(seed: bytes, n_bytes: int) -> NDArray[np.uint8]:
    """The first bytes of a seed's ChaCha20 key stream. A seed is used once, so the nonce is 0."""
    encryptor = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(n_bytes)), dtype=np.uint8)


def seal(key: bytes, number: int, message: bytes, where: bytes) -> bytes:
    """Encrypt ``message``, the ``number``-th under ``key``, bound to ``where``."""
    return ChaCha20Poly1305(key).encrypt(number.to_bytes(12, "little"), message, where)


def unseal(key: bytes, number: int, sealed: bytes, where: bytes) -> bytes:
    """Decrypt what `seal` made. Raises `WireError` for anything else."""
    try:
        return ChaCha20Poly1305(key).decrypt(number.to_bytes(12, "little"), sealed, where)
    except InvalidTag as error:
        raise WireError(
            "a share is not from its sender, or not for this use: expected that of this sum", field="shares"
        ) from error


def identity_of(private: bytes) -> bytes:
    """The Ed25519 public key of ``private``, by which others know a device."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(private: bytes, message: bytes) -> bytes:
    """A signature of 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def check_signature(identity: bytes, signature: bytes, message: bytes) -> None:
    """Raise `WireError` unless the owner of ``identity`` signed ``message``."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise WireError("its keys are not signed by it: expected its own signature", field="signature") from error
