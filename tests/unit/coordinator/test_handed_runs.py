"""Runs that are handed to a coordinator over real sockets: the queue, its worker, its routes, and their client."""

from __future__ import annotations

import asyncio
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fedbpt.coordinator.devices import drafting
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.service.remote_runs import RemoteRuns
from fedbpt.coordinator.service.run_queue import DEFAULT_QUOTA, Quota, RunQueue
from fedbpt.coordinator.service.run_routes import run_routes
from fedbpt.coordinator.service.run_worker import RunWorker
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import ConfigError, CoordinatorRefusedError, FedbptError, FederationError, StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.specs import ObjectiveSpec
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted
from fedbpt.runs.store import RunStore
from fedbpt.runs.submission import Job, Submission
from tests.support.caller import called_by, wait_until
from tests.support.fake_device import FINGERPRINT, FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import ToyTask, settings

pytestmark = pytest.mark.slow

TOKEN = "t" * 43
OTHER = TaskIdentity.of("other", ("x", "y"), (("text",), "label", None))


def submission(run: str = "r", rounds: int = 3, evaluate_every: int = 0, **changes: Any) -> Submission:
    chosen = settings(rounds=rounds, evaluate_every=evaluate_every)
    return Submission(run=run, task=ToyTask(), settings=chosen, **changes)


class Desk:
    """A coordinator's worker, with what it writes to; a new one on the same folder is the coordinator restarted."""

    def __init__(self, stack: ExitStack, folder: Path, quota: Quota, wait_s: float) -> None:
        self.folder = folder
        self.told: list[str] = []
        self.store = stack.enter_context(RunStore(folder / "runs.db"))
        self.queue = stack.enter_context(RunQueue(folder / "queue.db", quota))
        self.registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        self.worker = RunWorker(self.queue, self.store, self.registry, folder / "logs", wait_s, self.told.append)
        self.server: CoordinatorServer
        self.runs: RemoteRuns

    def follow(self, run: str = "r") -> list[Event | Job]:
        """What a follower sees of a run until it is finished."""
        seen: list[Event | Job] = []
        self.result = self.runs.follow(run, seen.append, seen.append, self.told.append)
        return seen

    def send_away(self, device: str, seconds: float) -> None:
        """Have a new ``device`` that was told to call after ``seconds``, and does not call before."""
        self.registry.invite(device)
        office = self.server.office

        async def pause() -> None:
            office.box(device).pause(seconds)

        assert office._loop is not None
        asyncio.run_coroutine_threadsafe(pause(), office._loop).result(60)

    def states(self) -> dict[str, str]:
        return {job.run: job.state for job in self.runs.jobs()}


@contextmanager
def desk(
    folder: Path, *devices: FakeDevice, quota: Quota = DEFAULT_QUOTA, wait_s: float = 30.0, starts: bool = True
) -> Iterator[Desk]:
    with ExitStack() as stack:
        made = Desk(stack, folder, quota, wait_s)
        routes = run_routes(made.worker, TOKEN)
        made.server = stack.enter_context(called_by(folder, *devices, more=routes))
        made.runs = stack.enter_context(RemoteRuns(made.server.url, TOKEN))
        if starts:
            stack.callback(made.worker.stop)
            made.worker.start(made.server)
        yield made
        assert made.worker.failure is None


def test_ctrl_c_while_it_is_waited_for_does_not_end_the_worker(tmp_path: Path) -> None:
    a = FakeDevice("a")
    a.gate.clear()
    with desk(tmp_path, a) as found:
        found.runs.hand_in(submission())
        wait_until(lambda: found.states()["r"] == "running")
        main = threading.get_ident()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                found.worker.join(30)
        finally:
            signal.signal(signal.SIGINT, before)
        assert found.worker.is_alive()
        found.worker.stop()
        assert not found.worker.is_alive()
        assert found.told[-1].startswith("run r: stopped with the coordinator")


def test_runs_go_one_after_the_other_over_the_same_devices(tmp_path: Path) -> None:
    a, b = FakeDevice("a"), FakeDevice("b")
    a.gate.clear()  # holds the first run, so that the others wait
    with desk(tmp_path, a, b) as found:
        assert found.runs.hand_in(submission("one")).state == "queued"
        wait_until(lambda: found.states()["one"] == "running")
        waiting = [found.runs.hand_in(submission(run)) for run in ("two", "three")]
        assert [job.ahead for job in waiting] == [1, 2]
        assert [(job.run, job.state) for job in found.runs.jobs()] == [
            ("one", "running"),
            ("two", "queued"),
            ("three", "queued"),
        ]
        a.gate.set()
        seen = {run: found.follow(run) for run in ("one", "two", "three")}
        assert found.states() == dict.fromkeys(("one", "two", "three"), "finished")
        assert found.server.present() == ["a", "b"]
    assert found.result.rounds == 3
    assert [event.run for event in seen["one"] if isinstance(event, RunStarted)] == ["one"]
    assert isinstance(seen["one"][-2], RunFinished)
    assert [job.state for job in seen["one"] if isinstance(job, Job)] == ["running", "finished"]
    plans = [plan.run for plan in a.plans]
    assert sorted(set(plans), key=plans.index) == ["one", "two", "three"]
    assert plans == sorted(plans, key=plans.index)  # never two at a time
    for run in ("one", "two", "three"):
        assert b'"type":"RunFinished"' in (tmp_path / "logs" / f"{run}.jsonl").read_bytes()


def test_only_devices_that_hold_the_task_and_the_model_take_part(tmp_path: Path) -> None:
    devices = [FakeDevice("a"), FakeDevice("b", task=OTHER), FakeDevice("c", fingerprint="sha256:big")]
    with desk(tmp_path, *devices) as found:
        found.runs.hand_in(submission(model_fingerprint=FINGERPRINT))
        found.follow()
        assert [device.name for device in found.result.devices] == ["a"]
    assert [len(device.plans) > 0 for device in devices] == [True, False, False]


def test_a_run_without_devices_fails_and_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a"), wait_s=0.2) as found:
        task = msgspec.structs.replace(ToyTask(), name="other")
        found.runs.hand_in(Submission(run="r", task=task, settings=settings()))
        found.runs.hand_in(submission("next"))
        with raises(FederationError) as failed:
            found.follow()
        assert "0 of 1 devices with task 'other' call in (a: it has rows of task 'toy'" in str(failed.value)
        found.follow("next")
        assert found.states() == {"r": "failed", "next": "finished"}


def test_a_run_waits_for_the_devices_it_expects(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a"), wait_s=0.2) as found:
        found.runs.hand_in(submission(expect=2))
        with raises(FederationError) as failed:
            found.follow()
        assert "1 of 2 devices with task 'toy'" in str(failed.value)
        assert "waiting: 1 of 2" in "".join(found.told)


def test_a_run_that_waits_for_a_device_told_to_call_later_is_cancelled_and_stopped(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a")) as found:
        found.send_away("b", 90.0)
        found.runs.hand_in(submission())
        found.runs.hand_in(submission("next"))
        wait_until(lambda: "1 told to call later" in found.runs.jobs()[0].detail)
        found.runs.cancel("r")
        wait_until(lambda: found.states()["r"] == "cancelled")
        wait_until(lambda: "1 of 2 devices" in found.runs.jobs()[-1].detail)
        stopping = threading.Thread(target=found.worker.stop, daemon=True)
        stopping.start()
        wait_until(lambda: not stopping.is_alive())
        assert found.states() == {"r": "cancelled", "next": "running"}  # to be resumed


def test_a_run_begins_without_the_devices_that_were_told_to_call_later(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a"), wait_s=0.2) as found:
        found.send_away("b", 90.0)
        found.runs.hand_in(submission())
        wait_until(lambda: found.states()["r"] == "finished")
        found.follow()
        assert [device.name for device in found.result.devices] == ["a"]
        found.runs.hand_in(submission("both", expect=2))
        wait_until(lambda: found.states()["both"] == "failed")
        with raises(FederationError) as failed:
            found.follow("both")
        assert "--wait" in str(failed.value)


def test_a_run_is_forgotten_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[weakref.ref[Federation]] = []
    held: list[int] = []
    run = Federation.run

    def watched(federation: Federation) -> Any:
        held.append(sum(ref() is not None for ref in begun))
        begun.append(weakref.ref(federation))
        return run(federation)

    monkeypatch.setattr(Federation, "run", watched)
    a = FakeDevice("a")
    a.gate.clear()  # holds the first run, so that the others follow it at once
    with desk(tmp_path, a) as found:
        for name in ("one", "two", "three"):
            found.runs.hand_in(submission(name))
        a.gate.set()
        found.follow("three")
    assert held == [0, 0, 0]


def test_a_cancelled_run_keeps_its_rounds_and_is_resumed_when_handed_in_again(tmp_path: Path) -> None:
    a = FakeDevice("a", slow_s=0.05)
    with desk(tmp_path, a) as found:
        found.runs.hand_in(submission(rounds=500))
        found.runs.hand_in(submission("other"))
        wait_until(lambda: (run := found.store.find_run("r")) is not None and run.n_rounds > 2)
        assert found.runs.cancel("other").state == "cancelled"
        found.runs.cancel("r")
        with raises(FederationError):
            found.follow()
        assert found.states() == {"other": "cancelled", "r": "cancelled"}
        assert found.runs.cancel("r").state == "cancelled"  # again: no error
        kept = found.store.get_run("r").n_rounds
        found.runs.hand_in(submission(rounds=kept + 2))
        seen = found.follow()
        assert [event.resumed for event in seen if isinstance(event, RunStarted)] == [kept]
        assert found.result.rounds == kept + 2


def test_a_restarted_coordinator_goes_on_where_it_was(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a", slow_s=0.02)) as found:
        found.runs.hand_in(submission(rounds=40))
        found.runs.hand_in(submission("next"))
        wait_until(lambda: (run := found.store.find_run("r")) is not None and run.n_rounds > 2)
    with RunStore(tmp_path / "runs.db") as store:
        before = store.get_run("r").n_rounds
        assert store.get_run("r").status == "stopped"
    assert before < 40
    with desk(tmp_path, FakeDevice("a", slow_s=0.02)) as found:
        seen = found.follow()
        resumed = found.result
        found.follow("next")
    assert [event.resumed for event in seen if isinstance(event, RunStarted)] == [before]
    with desk(tmp_path / "whole", FakeDevice("a")) as whole:
        whole.runs.hand_in(submission(rounds=40))
        whole.follow()
    assert (resumed.rounds, resumed.digest) == (40, whole.result.digest)


def test_a_resumed_run_goes_on_with_its_quorum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(tmp_path, FakeDevice("a", slow_s=0.05), FakeDevice("b")) as found:
        found.runs.hand_in(submission(rounds=40))
        wait_until(lambda: (run := found.store.find_run("r")) is not None and run.n_rounds > 2)
    monkeypatch.setattr(drafting, "RETURN_S", 0.2)
    with desk(tmp_path, FakeDevice("a")) as found:  # b is absent, but belongs to the run
        found.follow()
    assert [device.name for device in found.result.devices] == ["a", "b"]
    assert found.result.rounds == 40


def test_a_run_that_starts_over_does_so_once(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a")) as found:
        found.runs.hand_in(submission())
        found.follow()
        assert found.runs.hand_in(submission()).state == "finished"  # the stored result
        with raises(CoordinatorRefusedError, code="conflict"):
            found.runs.hand_in(msgspec.structs.replace(submission(), settings=settings(popsize=8)))
        other = msgspec.structs.replace(submission(fresh=True), settings=settings(popsize=8, rounds=3))
        assert found.runs.hand_in(other).state == "queued"
        seen = found.follow()
        assert [event.resumed for event in seen if isinstance(event, RunStarted)] == [0]
        assert found.result.settings.popsize == 8
    with RunQueue(tmp_path / "queue.db") as queue:
        assert queue.take() is None


def test_what_is_stopped_before_its_first_round_starts_over_again(tmp_path: Path) -> None:
    with RunQueue(tmp_path / "queue.db") as queue:
        queue.add(submission(fresh=True))
        taken = queue.take()
        assert taken is not None
        assert taken.fresh
        assert queue.take() == taken  # the coordinator was killed
        queue.begun("r")
        assert queue.take() == msgspec.structs.replace(taken, fresh=False)


def test_starting_over_does_not_silently_become_going_on(tmp_path: Path) -> None:
    plain, fresh = (codec.decode(codec.encode(submission(fresh=each)), Submission) for each in (False, True))
    with RunQueue(tmp_path / "queue.db") as queue:
        queue.add(plain)
        with raises(CoordinatorRefusedError, code="conflict") as refused:
            queue.add(fresh)
        assert "without --fresh" in str(refused.value)
        queue.end("r", "cancelled")
        for again in (fresh, fresh, plain):  # the last one follows
            queue.add(again)
        taken = queue.take()
        assert taken is not None
        assert taken.fresh


def test_the_queue_has_a_limit_and_a_quota(tmp_path: Path) -> None:
    quota = Quota(queued=2, evaluations=100, seconds=60.0)
    with desk(tmp_path, quota=quota, starts=False) as found:
        budget = {"evaluations": 100, "seconds": 60.0}
        for run in ("one", "two"):
            found.runs.hand_in(Submission(run=run, task=ToyTask(), settings=settings(**budget)))
        for wrong, code in (
            (budget, "too-many"),
            ({**budget, "evaluations": 101}, "over-quota"),
            ({**budget, "seconds": 0.0}, "over-quota"),
        ):
            with raises(CoordinatorRefusedError, code=code):
                found.runs.hand_in(Submission(run="three", task=ToyTask(), settings=settings(**wrong)))
        assert found.runs.hand_in(Submission(run="two", task=ToyTask(), settings=settings(**budget))).ahead == 1
        with raises(CoordinatorRefusedError, code="conflict"):
            found.runs.hand_in(Submission(run="two", task=ToyTask(), settings=settings(**budget, popsize=8)))


def test_a_run_over_its_quota_of_bytes_stops_and_keeps_its_rounds(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a"), quota=Quota(bytes=1)) as found:
        found.runs.hand_in(submission())
        with raises(FederationError) as failed:
            found.follow()
        assert "--max-bytes" in str(failed.value)
        assert found.store.get_run("r").n_rounds == 1
    with desk(tmp_path, FakeDevice("a")) as found:
        found.runs.hand_in(submission())
        found.follow()
        assert found.result.rounds == 3


def test_a_run_that_is_over_its_quota_of_bytes_does_not_go_on(tmp_path: Path) -> None:
    a = FakeDevice("a")
    with desk(tmp_path, a, quota=Quota(bytes=1)) as found:
        for _ in range(2):
            found.runs.hand_in(submission())
            with raises(FederationError) as failed:
                found.follow()
            assert "--max-bytes" in str(failed.value)
        assert found.store.get_run("r").n_rounds == 1
    assert len(a.plans) == 1


def test_evaluations_count_for_the_quota_of_bytes(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a")) as found:
        found.runs.hand_in(submission(rounds=1, evaluate_every=1))
        seen = found.follow()
        used = [event.bytes_up + event.bytes_down for event in seen if isinstance(event, RoundClosed)]
    (tmp_path / "other").mkdir()
    with desk(tmp_path / "other", FakeDevice("a"), quota=Quota(bytes=used[-1])) as found:
        found.runs.hand_in(submission(rounds=1, evaluate_every=1))
        with raises(FederationError) as failed:
            found.follow()
        assert "--max-bytes" in str(failed.value)
        assert found.store.get_run("r").n_rounds == len(used)


@pytest.mark.parametrize("fresh", [False, True])
def test_settings_that_do_not_fit_the_task_are_refused(tmp_path: Path, fresh: bool) -> None:
    with desk(tmp_path, starts=False) as found:
        wrong = settings(objective=ObjectiveSpec(loss="nll", readout_words=0))
        with raises(CoordinatorRefusedError, code="conflict") as refused:
            found.runs.hand_in(Submission(run="r", task=ToyTask(), settings=wrong, fresh=fresh))
        assert "nll" in str(refused.value)
        assert found.states() == {}


def test_a_fault_fails_its_run_only_and_says_nothing_of_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Federation) -> None:
        raise ValueError("secret")

    with desk(tmp_path, FakeDevice("a")) as found:
        with monkeypatch.context() as patched:
            patched.setattr(Federation, "run", fail)
            found.runs.hand_in(submission("broken"))
            with raises(FederationError) as failed:
                found.follow("broken")
        assert "ValueError" in str(failed.value)
        assert "secret" not in str(failed.value)
        found.runs.hand_in(submission())
        found.follow()


def test_only_the_admin_token_opens_the_routes(tmp_path: Path) -> None:
    with desk(tmp_path, FakeDevice("a"), starts=False) as found:
        found.runs.hand_in(submission())
        paths = [("GET", ""), ("POST", ""), ("GET", "/r"), ("DELETE", "/r"), ("GET", "/r/events"), ("GET", "/r/result")]
        with httpx.Client(base_url=found.server.url, trust_env=False) as stranger:
            for method, path in paths:
                assert stranger.request(method, f"/v1/runs{path}").status_code == 401
            for _ in range(20):
                status = stranger.get("/v1/runs", headers={"authorization": "Bearer guess"}).status_code
            assert status == 429
        assert found.states() == {"r": "queued"}  # the token still opens them


def test_unknown_runs_and_those_without_a_result_are_refused(tmp_path: Path) -> None:
    with desk(tmp_path, starts=False) as found:
        with raises(CoordinatorRefusedError, code="unknown-run"):
            found.runs.cancel("r")
        found.runs.hand_in(submission())
        head = {"authorization": f"Bearer {TOKEN}", "accept": "application/json"}
        with httpx.Client(base_url=found.server.url, headers=head, trust_env=False) as http:
            for path in ("/v1/runs/r/result", "/v1/runs/r/events"):
                assert (http.get(path).status_code, http.get(path).json()["code"]) == (409, "conflict")
            assert http.get("/v1/runs/r").json()["state"] == "queued"
            for body in (b"{}", b"", b'{"run": "../r"}'):
                answer = http.post("/v1/runs", content=body, headers={"content-type": "application/json"})
                assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


def test_another_server_or_none_is_told_from_a_coordinator(tmp_path: Path) -> None:
    with called_by(tmp_path) as server, RemoteRuns(server.url, TOKEN) as runs:
        url = server.url
        with raises(FedbptError) as other:
            runs.jobs()
        assert "fedbpt coordinator" in str(other.value)
    with RemoteRuns(url, TOKEN) as runs, raises(FedbptError) as absent:
        runs.jobs()
    assert url in str(absent.value)
    with raises(ConfigError, field="coordinator"):
        RemoteRuns("http://example.org:8400", TOKEN)


def test_a_follower_sees_a_restart_and_the_end(tmp_path: Path) -> None:
    with ExitStack() as first:
        found = first.enter_context(desk(tmp_path, FakeDevice("a", slow_s=0.02)))
        port = found.server.port
        found.runs.hand_in(submission(rounds=60))
        told: list[str] = []
        events: list[Event] = []
        results: list[Any] = []

        def follow() -> None:
            with RemoteRuns(f"http://127.0.0.1:{port}", TOKEN) as runs:
                results.append(runs.follow("r", events.append, lambda _job: None, told.append))

        follower = threading.Thread(target=follow)
        follower.start()
        wait_until(lambda: any(isinstance(event, RoundClosed) for event in events))
    wait_until(lambda: bool(told))
    with ExitStack() as second:
        again = Desk(second, tmp_path, DEFAULT_QUOTA, 30.0)
        routes = run_routes(again.worker, TOKEN)
        again.server = second.enter_context(called_by(tmp_path, FakeDevice("a"), port=port, more=routes))
        second.callback(again.worker.stop)
        again.worker.start(again.server)
        follower.join(60)
    assert [result.rounds for result in results] == [60]
    assert "trying again" in told[0]
    assert told[-1].endswith("responds again")


def test_another_file_is_no_queue(tmp_path: Path) -> None:
    RunStore(tmp_path / "queue.db").close()
    with raises(StoreError):
        RunQueue(tmp_path / "queue.db")


@pytest.mark.parametrize("name", ["evaluations", "tokens", "seconds"])
def test_a_quota_needs_a_budget(name: str) -> None:
    quota = Quota(**{name: 10})
    quota.check(settings(**{name: 10}))
    with raises(CoordinatorRefusedError, code="over-quota"):
        quota.check(settings(**{name: 0}))
