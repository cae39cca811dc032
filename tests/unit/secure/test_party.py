"""Secure aggregation between parties: sums are right whoever drops out, and single results stay hidden."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.errors import InputError, WireError
from fedbpt.protocol.rounds import (
    KeysResult,
    KeysWork,
    MaskedField,
    SecureUse,
    SharesResult,
    SharesWork,
    UnmaskResult,
    UnmaskWork,
)
from fedbpt.secure import keys, shamir
from fedbpt.secure.fixed_point import pack, pack_states, unpack, unpack_states
from fedbpt.secure.layout import Vector
from fedbpt.secure.party import Party, secret_of, unmasked
from fedbpt.secure.sizes import SEALED_BYTES, threshold_of
from tests.support.raises import raises

N_USES = 3
NAMES = tuple("abcde")


class Group:
    """Parties with shared secrets, as a coordinator sees them."""

    def __init__(self, names: Sequence[str] = NAMES, threshold: int | None = None, **options: Any) -> None:
        self.names = tuple(names)
        self.threshold = threshold or threshold_of(len(self.names))
        self.parties = {name: Party(**options) for name in names}
        self.keys = {name: party.keys(name, KeysWork(epoch="e", n_uses=N_USES)) for name, party in self.parties.items()}
        self.asked = SharesWork(
            epoch="e", threshold=self.threshold, names=self.names, keys=tuple(self.keys[name] for name in names)
        )
        self.told: dict[str, SharesResult] = {}

    def share(self) -> Group:
        self.told = {name: party.shares(self.asked) for name, party in self.parties.items()}
        return self

    def use(self, index: int = 0, peers: Iterable[str] | None = None) -> SecureUse:
        return SecureUse(epoch="e", index=index, peers=tuple(peers or self.names), largest=1000.0)

    def sealed(self, of: str, to: str, index: int) -> bytes:
        return self.told[of].sealed[self.names.index(to)][SEALED_BYTES * index : SEALED_BYTES * (index + 1)]

    def unmask_work(self, survivors: Sequence[str], dropped: Sequence[str], to: str, index: int = 0) -> UnmaskWork:
        sealed = tuple(self.sealed(name, to, index) for name in [*survivors, *dropped])
        return UnmaskWork(epoch="e", index=index, survivors=tuple(survivors), dropped=tuple(dropped), sealed=sealed)

    def total(
        self, survivors: Sequence[str], answering: Sequence[str], vectors: dict[str, Vector], index: int
    ) -> Vector:
        """The sum over ``survivors``, where only ``answering`` reveal their shares."""
        use = self.use(index)
        dropped = [name for name in self.names if name not in survivors]
        masked = {name: self.parties[name].mask(use, "asked", vectors[name]) for name in survivors}
        told = {
            name: self.parties[name].unmask(self.unmask_work(survivors, dropped, name, index)) for name in answering
        }
        found = {
            name: secret_of(self.names, {to: said.shares[place] for to, said in told.items()}, self.threshold)
            for place, name in enumerate([*survivors, *dropped])
        }
        seeds = {name: found[name] for name in survivors}
        return unmasked(use, "asked", self.keys, masked, seeds, {name: found[name] for name in dropped})


def vector(numbers: Sequence[float], states: Sequence[float] = (0.5,)) -> Vector:
    fields = (
        MaskedField(name="x", shape=(len(numbers),), bits=64),
        MaskedField(name="y", shape=(len(states),), bits=32),
    )
    return Vector(fields, pack(np.array(numbers), 5), pack_states(np.array(states), 1000.0))


@pytest.fixture(scope="module")
def group() -> Group:
    return Group().share()


def test_the_sum_is_right_for_every_set_of_survivors_that_is_large_enough() -> None:
    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(scale=1000, size=4).round(3) for name in NAMES}
    states = {name: rng.normal(size=3).round(2) for name in NAMES}
    vectors = {name: vector(numbers[name].tolist(), states[name].tolist()) for name in NAMES}
    for size in (4, 5):
        for survivors in combinations(NAMES, size):
            group = Group().share()  # a sum is asked for once
            for index, answering in enumerate((survivors[:4], survivors[-4:])):
                total = group.total(survivors, answering, vectors, index)
                expected = np.sum([numbers[name] for name in survivors], axis=0)
                np.testing.assert_allclose(unpack(total.wide), expected, atol=1e-6)
                expected = np.sum([states[name] for name in survivors], axis=0)
                np.testing.assert_allclose(unpack_states(total.narrow, 1000.0), expected, atol=1e-4)


def test_too_few_shares_give_nothing(group: Group) -> None:
    survivors = list(NAMES)
    for name in NAMES[:3]:
        group.parties[name].mask(group.use(2), "asked", vector([1.0]))
    told = {name: group.parties[name].unmask(group.unmask_work(survivors, [], name, 2)) for name in NAMES[:3]}
    few = [said.shares[0] for said in told.values()]
    seed = shamir.combine([0, 1, 2], few)
    with raises(WireError, field="shares"):
        unmasked(group.use(2), "asked", group.keys, {"a": vector([1.0])}, {"a": seed}, {})


def test_what_is_sent_of_one_device_is_uniform() -> None:
    sent = []
    for _ in range(8):
        group = Group("abc").share()
        zeros = vector([0.0] * 400, [0.0] * 400)
        sent.append(group.parties["b"].mask(group.use(), "asked", zeros).to_bytes())
    counts = np.bincount(np.frombuffer(b"".join(sent), dtype=np.uint8), minlength=256)
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 160 < chi_square < 380  # 255 ± 22.6: within five standard deviations
    bits = np.unpackbits(np.frombuffer(b"".join(sent), dtype=np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


def test_two_sums_have_different_masks(group: Group) -> None:
    same = vector([1.0, 2.0])
    first, second = (group.parties["a"].mask(group.use(index), f"asked {index}", same) for index in (0, 1))
    assert not np.intersect1d(first.wide, second.wide).size


def test_the_same_question_has_the_same_answer_and_another_none() -> None:
    group = Group().share()
    party = group.parties["a"]
    first = party.mask(group.use(), "asked", vector([1.0]))
    np.testing.assert_array_equal(party.mask(group.use(), "asked", vector([1.0])).wide, first.wide)
    with raises(InputError, field="index"):
        party.mask(group.use(), "asked otherwise", vector([2.0]))


def test_shares_are_revealed_for_one_division_only() -> None:
    group = Group().share()
    party = group.parties["a"]
    party.mask(group.use(), "asked", vector([1.0]))
    first = party.unmask(group.unmask_work("abcd", "e", "a"))
    assert party.unmask(group.unmask_work("abcd", "e", "a")) == first
    with raises(InputError, field="survivors"):
        party.unmask(group.unmask_work("abce", "d", "a"))  # both secrets of d would be known
    with raises(InputError, field="index"):
        party.mask(group.use(), "asked", vector([1.0]))


@pytest.mark.parametrize(
    ("survivors", "dropped"),
    [("ab", "cde"), ("abc", "de"), ("bcde", "a"), ("abcd", "de"), ("abcx", "de"), ("abcd", ""), ("", "abcde")],
)
def test_shares_are_not_revealed_for_an_impossible_division(survivors: str, dropped: str) -> None:
    group = Group().share()
    group.parties["a"].mask(group.use(1), "asked", vector([1.0]))
    sealed = tuple(b"" for _ in survivors + dropped)
    work = UnmaskWork(epoch="e", index=1, survivors=tuple(survivors), dropped=tuple(dropped), sealed=sealed)
    with raises(InputError, field="survivors"):
        group.parties["a"].unmask(work)


def test_shares_are_not_revealed_of_a_sum_that_this_device_did_not_mask() -> None:
    group = Group().share()
    with raises(InputError, field="survivors"):
        group.parties["a"].unmask(group.unmask_work("abcde", "", "a"))
    group.parties["a"].mask(group.use(0, "abcd"), "asked", vector([1.0]))
    with raises(InputError, field="survivors"):
        group.parties["a"].unmask(group.unmask_work("abcde", "", "a"))  # e was not among the peers


def test_what_was_not_asked_of_all_alike_is_not_unmasked() -> None:
    group = Group().share()
    masked = {name: group.parties[name].mask(group.use(), "asked", vector([1.0])) for name in NAMES[1:]}
    masked["a"] = group.parties["a"].mask(group.use(), "asked otherwise", vector([1.0]))
    told = {name: group.parties[name].unmask(group.unmask_work(NAMES, "", name)) for name in NAMES}
    seeds = {
        name: secret_of(NAMES, {to: said.shares[place] for to, said in told.items()}, group.threshold)
        for place, name in enumerate(NAMES)
    }
    total = unmasked(group.use(), "asked", group.keys, masked, seeds, {})
    assert abs(unpack(total.wide)[0]) > 1e4  # random: 5 would be the sum


def test_a_replayed_or_foreign_share_is_refused() -> None:
    group = Group().share()
    group.parties["a"].mask(group.use(1), "asked", vector([1.0]))
    work = group.unmask_work("abcde", "", "a", 1)
    replayed = (group.sealed("b", "a", 0), *work.sealed[1:])  # of another sum
    foreign = (work.sealed[1], *work.sealed[1:])  # of another device
    other = (work.sealed[0], group.sealed("b", "c", 1), *work.sealed[2:])  # for another device
    old = (Group().share().sealed("a", "a", 1), *work.sealed[1:])  # of another epoch
    for sealed in (replayed, foreign, other, old):
        with raises(WireError, field="shares"):
            group.parties["a"].unmask(msgspec.structs.replace(work, sealed=sealed))


def test_one_wrong_share_is_left_out_where_there_are_enough() -> None:
    shares = dict(zip(NAMES, shamir.split(bytes(31) + b"x", 5, 3), strict=True))
    shares["b"] = bytes(33)
    assert secret_of(NAMES, shares, 3, lambda secret: secret == bytes(31) + b"x") == bytes(31) + b"x"
    few = {name: shares[name] for name in "abc"}
    with raises(WireError, field="shares"):
        secret_of(NAMES, few, 3, lambda secret: secret == bytes(31) + b"x")


def test_a_wrong_share_does_not_give_a_wrong_sum() -> None:
    group = Group().share()
    vectors = {name: vector([1.0]) for name in NAMES}
    honest = Party.unmask

    def lying(party: Party, work: UnmaskWork) -> UnmaskResult:
        said = honest(party, work)
        return UnmaskResult(shares=(bytes(33), *said.shares[1:])) if party is group.parties["b"] else said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Party, "unmask", lying)
        with raises(WireError, field="shares"):
            group.total(NAMES, NAMES, vectors, 0)


@pytest.mark.parametrize("peers", ["ab", "bcde", "abcx", "aab"])
def test_a_sum_over_too_few_or_other_devices_is_refused(group: Group, peers: str) -> None:
    with raises(InputError, field="peers"):
        group.parties["a"].mask(group.use(1, peers), "asked", vector([1.0]))


@pytest.mark.parametrize("threshold", [1, 3, 6])
def test_a_threshold_of_less_than_two_thirds_is_refused(threshold: int) -> None:
    with raises(InputError, field="threshold"):
        Group(threshold=threshold).share()


def test_keys_that_another_device_signed_are_refused() -> None:
    group = Group()
    swapped = msgspec.structs.replace(group.keys["b"], cipher_key=group.keys["c"].cipher_key)
    renamed = group.keys["c"]
    for wrong in (swapped, renamed, msgspec.structs.replace(group.keys["b"], signature=bytes(64))):
        changed = tuple(wrong if name == "b" else group.keys[name] for name in NAMES)
        with raises(InputError, field="keys"):
            group.parties["a"].shares(msgspec.structs.replace(group.asked, keys=changed))


def test_with_trusted_identities_no_other_takes_part() -> None:
    made = {name: keys.new_key() for name in "abc"}
    trusted = {name: keys.identity_of(private) for name, private in made.items()}
    parties = {name: Party(private, trusted) for name, private in made.items()}
    parties["d"] = Party()
    found: dict[str, KeysResult] = {
        name: party.keys(name, KeysWork(epoch="e", n_uses=1)) for name, party in parties.items()
    }
    asked = SharesWork(epoch="e", threshold=2, names=tuple("abc"), keys=tuple(found[name] for name in "abc"))
    assert len(parties["a"].shares(asked).sealed) == 3
    impostor = Party().keys("c", KeysWork(epoch="e", n_uses=1))
    with raises(InputError, field="identity"):
        parties["b"].shares(msgspec.structs.replace(asked, keys=(found["a"], found["b"], impostor)))
    with raises(InputError, field="identity"):
        parties["b"].shares(
            msgspec.structs.replace(asked, threshold=3, names=tuple("abcd"), keys=tuple(found.values()))
        )


def test_a_restarted_device_has_no_secrets_of_the_epoch(group: Group) -> None:
    with raises(InputError, field="epoch"):
        Party().mask(group.use(), "asked", vector([1.0]))


def test_numbers_that_might_overflow_are_cut_without_a_word() -> None:
    """An error would tell whether one device's number is beyond a bound that the coordinator chooses."""
    most = unpack(pack(np.array([1e12, -1e300, np.nan, np.inf]), 5))
    assert most[0] == -most[1] == most[3] == pytest.approx(2.0**38 / 5)
    assert most[2] == 0.0
    assert abs(unpack_states(pack_states(np.array([1e9]), 1000.0), 1000.0)[0]) <= 2.0 * 1024


def test_of_three_devices_two_remove_masks_of_more_over_two_thirds() -> None:
    assert [threshold_of(n) for n in (3, 4, 5, 6, 7, 9, 100)] == [2, 3, 4, 5, 5, 7, 67]


@pytest.mark.parametrize("values", [[0.0, -1e9, 1e9, 2.5e-7], [0.1] * 50])
def test_fixed_point_numbers_are_exact_to_their_step(values: list[float]) -> None:
    np.testing.assert_allclose(unpack(pack(np.array(values), 3)), values, atol=3e-8)


def test_shares_say_nothing_below_the_threshold() -> None:
    """With one share less than needed, every secret is as likely: any value of the missing share gives one."""
    shares = shamir.split(bytes(32), 5, 3)
    assert shamir.combine([0, 2, 4], [shares[0], shares[2], shares[4]]) == bytes(32)
    assert shamir.combine([1, 2, 3], shares[1:4]) == bytes(32)
    found = {shamir.combine([0, 1, 2], [shares[0], shares[1], bytes([i]) + bytes(32)]) for i in range(8)}
    assert len(found) == 8
