"""``fedbpt tune``: coordinate a run over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fedbpt.api import aggregator_for, make_prompt
from fedbpt.cli.options import AsJson, Quiet
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.clients.http import HttpClient
from fedbpt.config import load_config
from fedbpt.display import RunDisplay
from fedbpt.errors import ConfigError
from fedbpt.federation import Federation
from fedbpt.native_scorer import load_model
from fedbpt.store import RunStore
from fedbpt.tasks import load


def tune(
    run_file: Annotated[Path, typer.Argument(help="The run file (TOML); see docs/tune.md.", show_default=False)],
    device: Annotated[
        list[str] | None, typer.Option("--device", help="A device's address, as often as needed; adds to the file's.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the tuned prompt.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The devices' model, here too: needed to write the prompt.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what is stored of this run, and start over.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune over devices. A run that was stopped goes on where it stood; Ctrl-C loses at most one round.

    Example: fedbpt tune run.toml --device http://pi5:8401 --device http://pixel:8401
    """
    config = load_config(run_file)
    addresses = [*config.devices, *(device or [])]
    if not addresses:
        raise ConfigError(f"no devices: name them in {run_file} (devices = [...]) or with --device http://HOST:PORT")
    task = load(_beside(run_file, config.task))
    objective = msgspec.structs.replace(config.settings.objective, max_text_tokens=task.max_text_tokens)
    settings = msgspec.structs.replace(config.settings, objective=objective)
    out = prompt_file or (Path(config.prompt_file) if config.prompt_file else None)
    model = model or config.model
    if out is not None and model is None:
        raise ConfigError("writing the prompt needs the model here too: give --model, as on the devices")
    scorer = load_model(model) if model else None

    with RunStore(config.store) as store:
        if fresh and store.find_run(config.run):
            store.delete_run(config.run)
        clients = [HttpClient(address) for address in addresses]
        with RunDisplay(shown=not (quiet or as_json)) as display:
            result = Federation(clients, task, settings, aggregator_for(settings), store, config.run, display).run()

    saved = None
    if scorer is not None and out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        saved = make_prompt(scorer, task, result).save(out)
    if as_json:
        typer.echo(msgspec.json.encode(result_as_json(result, saved)).decode())
    else:
        print_result(result, saved)


def _beside(run_file: Path, task: str) -> str:
    """A task file is looked for beside the run file first."""
    candidate = run_file.parent / task
    return str(candidate) if candidate.is_file() else task
