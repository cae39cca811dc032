"""The command line: ``fedbpt COMMAND``. One command a file; errors are one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import typer

from fedbpt.cli import demo, device, evaluate, models, runs, tune
from fedbpt.errors import FedbptError

app = typer.Typer(
    name="fedbpt",
    help="Federated black-box prompt tuning: adapt an LLM across devices that keep their data.\n\nExample: fedbpt demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("device")(device.device)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(models.app)
app.add_typer(runs.app)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options before the command."""
    del debug  # read by main, which outlives the command


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``fedbpt`` program. Exit codes: 0 done, 1 it failed, 2 the command was wrong, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        typer.echo("fedbpt: stopped", err=True)
        code = 130
    except FedbptError as error:
        if "--debug" in given:
            raise
        typer.echo(f"fedbpt: {error}", err=True)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
