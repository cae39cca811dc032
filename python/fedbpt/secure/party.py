"""`Party`: a device's part in secure aggregation: its keys, its masks, and what it reveals of them.

For each sum a device has two secrets: the seed of its own mask, and an X25519 key from which it derives a mask together
with each other device. Only one of the two is revealed, by the others' shares: the seed if its result is in the sum, so
that its own mask can be subtracted, or the key if it dropped out, so that the others' masks with it can be.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError, WireError
from fedbpt.protocol.rounds import (
    KeysResult,
    KeysWork,
    SecureUse,
    SharesResult,
    SharesWork,
    UnmaskResult,
    UnmaskWork,
)
from fedbpt.secure import keys, shamir
from fedbpt.secure.layout import Vector
from fedbpt.secure.sizes import FEWEST, threshold_of

_KEPT_EPOCHS: Final = 2
_SECRET: Final = keys.KEY_BYTES


class _Epoch:
    """A device's secrets of an epoch, and what it has said of them."""

    def __init__(self, name: str, n_uses: int) -> None:
        self.name = name
        self.cipher_key = keys.new_key()
        self.mask_keys = [keys.new_key() for _ in range(n_uses)]
        self.seeds = [keys.new_key() for _ in range(n_uses)]
        self.threshold = 0
        self.others: dict[str, KeysResult] = {}
        self.told: SharesResult | None = None
        self.asked: bytes = b""
        self.masked: dict[int, tuple[str, tuple[str, ...]]] = {}  # what each use masked, and its peers
        self.revealed: dict[int, bytes] = {}  # digest of the lists for which each use's shares were revealed


class Party:
    """Kept in memory only: a device that is restarted takes part again from the next epoch.

    Args:
        identity: the Ed25519 private key by which others know this device; None: a new one.
        trusted: identities of the devices whose keys are accepted, by name; None: the coordinator is trusted to pass on
            the devices' own keys.
    """

    def __init__(self, identity: bytes | None = None, trusted: Mapping[str, bytes] | None = None) -> None:
        self._private = identity or keys.new_key()
        self._trusted = trusted
        self._epochs: OrderedDict[str, _Epoch] = OrderedDict()

    @property
    def identity(self) -> bytes:
        """The public key by which others know this device."""
        return keys.identity_of(self._private)

    def keys(self, name: str, work: KeysWork) -> KeysResult:
        """Make the keys of an epoch; those made before, if it is known. ``name``: of this device in the run."""
        if work.epoch not in self._epochs:
            self._epochs[work.epoch] = _Epoch(name, work.n_uses)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        epoch = self._epochs[work.epoch]
        if (epoch.name, len(epoch.seeds)) != (name, work.n_uses):
            raise InputError(f"epoch {work.epoch} has other keys here: begin another", field="epoch")
        made = KeysResult(
            identity=self.identity,
            cipher_key=keys.public_key(epoch.cipher_key),
            mask_keys=b"".join(map(keys.public_key, epoch.mask_keys)),
            seed_digests=b"".join(hashlib.sha256(seed).digest() for seed in epoch.seeds),
            signature=b"",
        )
        signature = keys.sign(self._private, signed(work.epoch, name, made))
        return KeysResult(**{**_fields(made), "signature": signature})

    def shares(self, work: SharesWork) -> SharesResult:
        """Check the others' keys, and share this device's secrets with them.

        Raises `InputError` for keys that are not signed by a device that is trusted, or too few devices.
        """
        epoch = self._epoch(work.epoch)
        asked = hashlib.sha256(repr(work).encode()).digest()
        if epoch.told is not None:
            if epoch.asked != asked:
                raise InputError(f"secrets of epoch {work.epoch} were shared otherwise: begin another", field="epoch")
            return epoch.told
        self._check_group(epoch, work)
        n = len(work.names)
        n_uses = len(epoch.seeds)
        of_keys = [shamir.split(key, n, work.threshold) for key in epoch.mask_keys]
        of_seeds = [shamir.split(seed, n, work.threshold) for seed in epoch.seeds]
        sealed = []
        for place, (name, other) in enumerate(zip(work.names, work.keys, strict=True)):
            key = keys.agree(epoch.cipher_key, other.cipher_key, purpose(work.epoch, "shares", epoch.name, name))
            where = purpose(work.epoch, "share", epoch.name, name)
            pairs = [of_keys[i][place] + of_seeds[i][place] for i in range(n_uses)]
            sealed.append(b"".join(keys.seal(key, i, pair, where) for i, pair in enumerate(pairs)))
        epoch.threshold = work.threshold
        epoch.others = dict(zip(work.names, work.keys, strict=True))
        epoch.told, epoch.asked = SharesResult(sealed=tuple(sealed)), asked
        return epoch.told

    def mask(self, use: SecureUse, asked: str, vector: Vector, name: str | None = None) -> Vector:
        """``vector`` plus this device's masks.

        Args:
            use: the sum. It masks one answer only.
            asked: digest of what all peers were asked for, with ``use``. It goes into the masks: where devices were
                asked for different things, these do not cancel out.
            vector: the numbers to add.
            name: the device's name in a plan, from which its rows and mini-batches are drawn; None: an evaluation.

        Raises `InputError` for another name than that of its keys, other peers than known ones, too few of them, or a
        use that has masked something else.
        """
        epoch = self._epoch(use.epoch)
        own = epoch.name
        if name not in (None, own):
            raise InputError(f"this device has keys as {own}: ask it by that name", field="device")
        self._check_use(epoch, use.index)
        known = set(use.peers) <= set(epoch.others) and own in use.peers
        if not known or len(set(use.peers)) != len(use.peers) or len(use.peers) < max(epoch.threshold, FEWEST):
            raise InputError(
                f"a sum is over at least {max(epoch.threshold, FEWEST)} devices of its epoch, this one among them",
                field="peers",
            )
        if epoch.masked.setdefault(use.index, (asked, use.peers)) != (asked, use.peers) or use.index in epoch.revealed:
            raise InputError(f"sum {use.index} of epoch {use.epoch} was asked for before: use another", field="index")
        masked = _added(vector, keys.stream(epoch.seeds[use.index], vector.n_bytes), 1)
        for peer in use.peers:
            if peer != own:
                public = nth(epoch.others[peer].mask_keys, use.index)
                seed = keys.agree(epoch.mask_keys[use.index], public, pair_purpose(use, asked, own, peer))
                masked = _added(masked, keys.stream(seed, vector.n_bytes), 1 if own < peer else -1)
        return masked

    def unmask(self, work: UnmaskWork) -> UnmaskResult:
        """This device's shares, for one division of the devices into survivors and dropped ones only."""
        epoch = self._epoch(work.epoch)
        self._check_use(epoch, work.index)
        named = [*work.survivors, *work.dropped]
        _, peers = epoch.masked.get(work.index, ("", ()))
        fits = sorted(named) == sorted(peers) and len(named) == len(work.sealed)
        enough = len(work.survivors) >= max(epoch.threshold, 2)
        if not fits or not enough or epoch.name not in work.survivors:
            raise InputError(
                f"expected the devices of a sum that this device masked, {max(epoch.threshold, 2)} or more of them "
                "survivors, this one among them",
                field="survivors",
            )
        lists = hashlib.sha256(repr((sorted(work.survivors), sorted(work.dropped))).encode()).digest()
        if epoch.revealed.setdefault(work.index, lists) != lists:
            raise InputError(
                f"shares of sum {work.index} were revealed for other survivors: use another sum", field="survivors"
            )
        found = []
        for number, (name, sealed) in enumerate(zip(named, work.sealed, strict=True)):
            secret = purpose(work.epoch, "shares", name, epoch.name)
            key = keys.agree(epoch.cipher_key, epoch.others[name].cipher_key, secret)
            pair = keys.unseal(key, work.index, sealed, purpose(work.epoch, "share", name, epoch.name))
            of_key, of_seed = pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :]
            found.append(of_seed if number < len(work.survivors) else of_key)
        return UnmaskResult(shares=tuple(found))

    def _epoch(self, epoch: str) -> _Epoch:
        if epoch not in self._epochs:
            raise InputError(
                f"this device has no keys of epoch {epoch}: it was restarted; begin another epoch, which includes it",
                field="epoch",
            )
        return self._epochs[epoch]

    def _check_use(self, epoch: _Epoch, index: int) -> None:
        if epoch.told is None or index >= len(epoch.seeds):
            raise InputError(f"sum {index} has no shared secrets here: begin another epoch", field="index")

    def _check_group(self, epoch: _Epoch, work: SharesWork) -> None:
        n = len(work.names)
        if n != len(work.keys) or len(set(work.names)) != n or epoch.name not in work.names or n < FEWEST:
            raise InputError(
                f"secure aggregation needs {FEWEST} or more devices, each with its keys, this one among them",
                field="names",
            )
        if not threshold_of(n) <= work.threshold <= n:
            raise InputError(
                f"threshold must be at least {threshold_of(n)} of {n} devices: else few could be told apart from the "
                "others",
                field="threshold",
            )
        for name, found in zip(work.names, work.keys, strict=True):
            self._check_keys(work.epoch, name, found, len(epoch.seeds))
        own = work.keys[work.names.index(epoch.name)]
        if own.cipher_key != keys.public_key(epoch.cipher_key) or own.identity != self.identity:
            raise InputError(
                "this device's own keys were changed on the way: expected those that it sent", field="keys"
            )

    def _check_keys(self, epoch: str, name: str, found: KeysResult, n_uses: int) -> None:
        known = found.identity if self._trusted is None else self._trusted.get(name)
        if known is None:
            raise InputError(f"device {name} is not among the trusted identities: add it to them", field="identity")
        if known != found.identity:
            raise InputError(
                f"device {name} has another identity than the trusted one: check its key, or the line in the file",
                field="identity",
            )
        try:
            check_keys(epoch, name, found, n_uses)
        except WireError as error:
            raise InputError(f"device {name}: {error}", field="keys") from error


def check_keys(epoch: str, name: str, found: KeysResult, n_uses: int) -> None:
    """Raise `WireError` unless the keys have the right sizes, and their signature."""
    fits = len(found.identity) == len(found.cipher_key) == _SECRET
    if not fits or not len(found.mask_keys) == len(found.seed_digests) == _SECRET * n_uses:
        raise WireError(f"keys have wrong sizes: expected those of {n_uses} sums", field="keys")
    keys.check_signature(found.identity, found.signature, signed(epoch, name, found))


def signed(epoch: str, name: str, found: KeysResult) -> bytes:
    """What a device's identity signs."""
    keys_of_uses = found.cipher_key + found.mask_keys + found.seed_digests
    return purpose(epoch, "keys", name) + hashlib.sha256(keys_of_uses).digest()


def purpose(epoch: str, *what: str) -> bytes:
    """What a key or signature is for; names hold no bar."""
    return "|".join(("fedbpt secure aggregation 1", epoch, *what)).encode()


def pair_purpose(use: SecureUse, asked: str, one: str, other: str) -> bytes:
    """What the key of two devices' mask is for; ``asked``: see `Party.mask`."""
    return purpose(use.epoch, "mask", str(use.index), *sorted((one, other)), asked)


def nth(joined: bytes, index: int) -> bytes:
    """Key number ``index`` of a row of keys."""
    return joined[_SECRET * index : _SECRET * (index + 1)]


def _fields(result: KeysResult) -> dict[str, bytes]:
    return {name: getattr(result, name) for name in result.__struct_fields__}


def _added(vector: Vector, mask: NDArray[np.uint8], sign: int) -> Vector:
    """``vector`` plus or minus a mask, modulo 2**64 and 2**32."""
    wide = mask[: vector.wide.nbytes].view("<u8").astype(np.uint64)
    narrow = mask[vector.wide.nbytes :].view("<u4").astype(np.uint32)
    if sign > 0:
        return Vector(vector.fields, vector.wide + wide, vector.narrow + narrow)
    return Vector(vector.fields, vector.wide - wide, vector.narrow - narrow)


def unmasked(
    use: SecureUse,
    asked: str,
    keys_of: Mapping[str, KeysResult],
    masked: Mapping[str, Vector],
    seeds: Mapping[str, bytes],
    mask_keys: Mapping[str, bytes],
) -> Vector:
    """The sum of the survivors' vectors ``masked``.

    Args:
        asked: see `Party.mask`.
        keys_of: all peers.
        seeds: of the survivors' own masks.
        mask_keys: private ones of the peers that dropped out.

    Raises `WireError` where a secret is not that of its device.
    """
    first = next(iter(masked.values()))
    wide, narrow = np.zeros_like(first.wide), np.zeros_like(first.narrow)
    for vector in masked.values():
        wide, narrow = wide + vector.wide, narrow + vector.narrow
    total = Vector(first.fields, wide, narrow)
    for name in masked:
        if not is_seed(seeds[name], keys_of[name], use.index):
            raise WireError(f"the shares of device {name}'s seed are wrong: use another sum", field="shares")
        total = _added(total, keys.stream(seeds[name], total.n_bytes), -1)
    for name, private in mask_keys.items():
        if not is_mask_key(private, keys_of[name], use.index):
            raise WireError(f"the shares of device {name}'s key are wrong: use another sum", field="shares")
        for survivor in masked:
            public = nth(keys_of[survivor].mask_keys, use.index)
            seed = keys.agree(private, public, pair_purpose(use, asked, name, survivor))
            total = _added(total, keys.stream(seed, total.n_bytes), -1 if survivor < name else 1)
    return total


def secret_of(
    names: Sequence[str],
    shares: Mapping[str, bytes],
    threshold: int,
    is_right: Callable[[bytes], bool] = lambda _: True,
) -> bytes:
    """The secret that ``threshold`` of the ``shares`` give; ``names``: all devices that were given one, in order.

    One wrong share does no harm where there is one more than needed. Raises `WireError` if no secret ``is_right``.
    """
    given = [(place, shares[name]) for place, name in enumerate(names) if name in shares]
    for left_out in range(-1, len(given)):
        chosen = [each for number, each in enumerate(given) if number != left_out][:threshold]
        if len(chosen) < threshold:
            break
        try:
            secret = shamir.combine([place for place, _ in chosen], [share for _, share in chosen])
        except WireError:
            continue
        if is_right(secret):
            return secret
    raise WireError("the shares of a secret are wrong: use another sum", field="shares")


def is_seed(seed: bytes, found: KeysResult, index: int) -> bool:
    """Whether ``seed`` is that of the device's own mask of sum ``index``."""
    return hashlib.sha256(seed).digest() == nth(found.seed_digests, index)


def is_mask_key(private: bytes, found: KeysResult, index: int) -> bool:
    """Whether ``private`` is the device's key of sum ``index``."""
    return keys.public_key(private) == nth(found.mask_keys, index)
