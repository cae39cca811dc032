"""Cost of secure aggregation, and what a run that only sees sums finds, compared with one that sees every report.

For fleets of several sizes, with all devices and with 30 % dropping out: bytes of messages per device and CPU time on a
device and on the coordinator, of an epoch's keys and of one sum; beside them the same numbers sent openly and added
up. Then a run over devices of this process with a model, openly and securely, on the same rows.

    python benchmarks/bench_secure.py
    python benchmarks/bench_secure.py --data DIR   # with DIR/train.csv and DIR/test.csv, columns text and label
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from bench_tasks import draw, read_rows
from numpy.typing import NDArray

import fedbpt
from fedbpt import tasks
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import DownloadError, MissingExtraError, ModelNotFoundError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import KeysResult, KeysWork, MaskedField, SecureUse, SharesWork, UnmaskWork
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, ObjectiveSpec
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.secure.sizes import SEALED_BYTES, threshold_of

N_USES = 64
VECTORS = {
    "search, 16 candidates": (17, 0),
    "sums of states, 15 readers, 6 labels": (200, 15 * 4 * 576 * (32 + 6 + 1)),
}
T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What ``call`` returns, and its CPU time, ms."""
    began = time.process_time()
    found = call()
    return found, 1e3 * (time.process_time() - began)


def group(n: int) -> tuple[list[str], list[Any], dict[str, KeysResult], list[Any], dict[str, float]]:
    """Names, parties, keys, sealed shares, and the costs of an epoch."""
    from fedbpt.secure.party import Party

    names = [f"device-{i:03}" for i in range(n)]
    parties = [Party() for _ in names]
    made = [
        timed(lambda p=p, name=name: p.keys(name, KeysWork(epoch="e", n_uses=N_USES)))
        for p, name in zip(parties, names, strict=True)
    ]
    keys = {name: found for name, (found, _) in zip(names, made, strict=True)}
    asked = SharesWork(epoch="e", threshold=threshold_of(n), names=tuple(names), keys=tuple(keys.values()))
    few = min(n, 8)  # the others cost as much
    told = [timed(lambda p=p: p.shares(asked)) for p in parties[:few]]
    shared = [found for found, _ in told] + [p.shares(asked) for p in parties[few:]]
    costs = {
        "KB up": (len(codec.encode(keys[names[0]])) + len(codec.encode(shared[0]))) / 1e3,
        "KB down": len(codec.encode(asked)) / 1e3,
        "device ms": statistics.fmean(ms for _, ms in made) + statistics.fmean(ms for _, ms in told),
    }
    return names, parties, keys, shared, costs


def sums(n: int, dropping: float, vector: tuple[int, int], made: Any, index: int) -> dict[str, float]:
    """Costs of one sum."""
    from fedbpt.secure.fixed_point import pack, pack_states, unpack
    from fedbpt.secure.layout import Vector, as_masked
    from fedbpt.secure.party import secret_of, unmasked

    names, parties, keys, shared, _ = made
    rng = np.random.default_rng(index)
    wide, narrow = vector
    fields = (MaskedField(name="x", shape=(wide,), bits=64), MaskedField(name="y", shape=(narrow,), bits=32))
    numbers: list[NDArray[np.float64]] = [rng.normal(size=wide) for _ in names]
    states = rng.normal(size=narrow)
    survivors = names[: n - int(dropping * n)]
    dropped = names[len(survivors) :]
    use = SecureUse(epoch="e", index=index, peers=tuple(names), largest=1000.0 * n)
    masked, mask_ms = {}, []
    for name, party, own in zip(survivors, parties, numbers, strict=False):
        packed = Vector(fields, pack(own, n), pack_states(states, 1000.0 * n))
        masked[name], ms = timed(lambda party=party, packed=packed: party.mask(use, "asked", packed))
        mask_ms.append(ms)
    named = [*survivors, *dropped]
    told, unmask_ms, down = {}, [], 0
    for place, name in enumerate(survivors[: threshold_of(n)]):
        sealed = tuple(
            shared[names.index(of)].sealed[place][SEALED_BYTES * index : SEALED_BYTES * (index + 1)] for of in named
        )
        work = UnmaskWork(epoch="e", index=index, survivors=tuple(survivors), dropped=tuple(dropped), sealed=sealed)
        told[name], ms = timed(lambda place=place, work=work: parties[place].unmask(work))
        unmask_ms.append(ms)
        down = len(codec.encode(work))

    def add_up() -> Vector:
        found = {
            name: secret_of(names, {to: said.shares[place] for to, said in told.items()}, threshold_of(n))
            for place, name in enumerate(named)
        }
        return unmasked(
            use,
            "asked",
            keys,
            masked,
            {name: found[name] for name in survivors},
            {name: found[name] for name in dropped},
        )

    total, coordinator_ms = timed(add_up)
    openly, open_ms = timed(lambda: np.sum(numbers[: len(survivors)], axis=0))
    assert np.allclose(unpack(total.wide), openly, atol=1e-5)
    up = len(codec.encode(as_masked(masked[names[0]]))) + len(codec.encode(told[survivors[0]]))
    open_up = len(codec.encode(Array.of(np.zeros(wide + narrow), "<f4")))
    return {
        "KB up": up / 1e3,
        "KB up, openly": open_up / 1e3,
        "KB down": down / 1e3,
        "device ms": statistics.fmean(mask_ms) + statistics.fmean(unmask_ms),
        "coordinator ms": coordinator_ms,
        "coordinator ms, openly": open_ms,
    }


def costs(sizes: list[int], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for n in sizes:
        made = group(n)
        say(f"{n} devices, keys of {N_USES} sums: " + shown(made[-1]))
        yield {"devices": n, "part": "keys", **made[-1]}
        index = 0
        for name, vector in VECTORS.items():
            for dropping in (0.0, 0.3):
                found = sums(n, dropping, vector, made, index)
                index += 1
                say(f"  {name}, {dropping:.0%} dropping: {shown(found)}")
                say(f"    {found['KB up'] / found['KB up, openly']:.1f} times the bytes of open numbers")
                yield {"devices": n, "part": name, "dropping": dropping, **found}


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def runs(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Runs over devices with the rows of a task, openly and securely."""
    scorer = fedbpt.load_model(args.model)
    train, test = (read_rows(args.data / f"{part}.csv") for part in ("train", "test"))
    test = [test[i] for i in generator(0, "test").permutation(len(test))[: args.test_rows]]
    task = tasks.draft_task(args.data / "train.csv").task
    for seed in range(args.seeds):
        rows, measured = (tasks.to_rows(part, task) for part in (draw(train, args.shots, seed), test))
        parts = tasks.partition([int(label) for _, label in rows], args.devices, seed=seed)
        for secure in (False, True):
            settings = RunSettings(
                rounds=args.rounds, seed=seed, popsize=16, secure=secure, evaluate_every=0, deadline_s=86400.0,
                objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens), stragglers=0.0,
            )  # fmt: skip
            devices = [
                Device(f"device-{i}", scorer, [rows[j] for j in part], test_rows=measured[i :: args.devices], task=task)
                for i, part in enumerate(parts)
            ]
            with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
                clients = [InProcessClient(device) for device in devices]
                result = Federation(clients, task, settings, settings.aggregator(), store, "bench").run()
            lines = {name: score.accuracy for name, score in result.scores("test").items()}
            up = max(device.bytes_up for device in result.devices) / 1e3
            say(
                f"seed {seed}, {'securely' if secure else 'openly'}: "
                + "  ".join(f"{name} {value:.3f}" for name, value in lines.items())
                + f"; {up:.0f} KB up, {result.total_seconds:.0f} s"
            )
            yield {"seed": seed, "secure": secure, **lines, "kb_up": up, "seconds": result.total_seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4, 100])
    parser.add_argument("--data", type=Path, help="a task's folder")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    points: list[dict[str, Any]] = []
    try:
        points += costs(args.sizes, say)
        if args.data is not None:
            points += runs(args, say)
    except (MissingExtraError, ModelNotFoundError, DownloadError, FileNotFoundError) as error:
        say(f"skipped: {error}")
    print(json.dumps({"bench": "secure", "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
