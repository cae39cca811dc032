"""SuperLink and SuperNodes as processes, over TLS: one node is killed, and the digest is still that of a native run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedbpt.runs.store import RunStore
from tests.flower.deployment import deployed
from tests.flower.toy_app import natively, short
from tests.flower.toy_processes import APP
from tests.support.caller import wait_until

NODES = 4


@pytest.mark.timeout(900)
def test_four_nodes_over_tls_with_one_restarted_give_the_native_digest(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    path = tmp_path / "runs.db"

    def closed() -> int:
        with RunStore(path) as store:
            return sum(1 for _ in store.rounds("r"))

    with deployed(tmp_path, NODES) as flower:

        def kill_one() -> None:
            wait_until(lambda: closed() > 0, 600)
            flower.kill_node("node-3")
            flower.start_node("node-3", partition_id=3, state=str(tmp_path / "node-3.state"))

        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        done = flower.run(app, store=str(path), devices=NODES)
        assert done.returncode == 0, done.stderr
        killer.join()
        [run] = flower.listing()
        assert run["status"] == "finished:completed", done.stdout
    native = natively(tmp_path / "native.db", NODES, short(rounds=2))
    with RunStore(path) as store:
        stored = list(store.rounds("r"))
        lost = {name for line in store.history("r") for name in line.lost}
    assert [len(one.reports) for one in stored] == [NODES] * 3
    with RunStore(tmp_path / "native.db") as other:
        assert [one.state_digest for one in stored] == [one.state_digest for one in other.rounds("r")]
    assert native.rounds == 2
    assert lost == {"node-3"}
    assert (tmp_path / "node-3.state").exists()
