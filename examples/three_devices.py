"""A federation of three devices on one machine, each with its own rows and HTTP server."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import fedbpt
from fedbpt.api import make_prompt
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

if __name__ == "__main__":
    fedbpt.models.pull("smollm2-135m")
    scorer = fedbpt.load_model("smollm2-135m")
    task = fedbpt.tasks.load("bbc-news")
    parts = fedbpt.tasks.split_rows(fedbpt.tasks.bbc_news(), {"a": 12, "b": 12, "c": 12, "test": 40}, seed=1)
    settings = RunSettings(rounds=6, popsize=12, seed=7)
    with ExitStack() as stack:
        clients = []
        for name in "abc":
            device = Device(name, scorer, parts[name], task=task)
            server = stack.enter_context(AgentServer(AgentService(device)))
            clients.append(HttpClient(server.url, name))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = stack.enter_context(RunStore(Path(folder) / "runs.db"))
        result = Federation(clients, task, settings, settings.aggregator(), store, "three").run()
    for summary in result.devices:
        print(f"{summary.name}: {summary.reports} reports, bytes {summary.bytes_up} up, {summary.bytes_down} down")
    prompt = make_prompt(scorer, task, result)
    print(f"accuracy {fedbpt.evaluate(scorer, task, parts['test'], prompt=prompt).accuracy:.3f}")
