"""The command line: ``fedbpt COMMAND``. One file per command; an error is one line and an exit code."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from keyword import iskeyword
from types import TracebackType
from typing import Annotated, Any

import typer

from fedbpt.cli.options import help_without_command
from fedbpt.cli.streams import repair_streams
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.errors import FedbptError, ModelWarning, RunStopped
from fedbpt.plain_text import PlainFormatter, echo
from fedbpt.version import VERSION

COMMANDS = (
    *("demo", "device", "tune", "coordinator", "evaluate", "chat", "serve", "export", "import"),
    *("bench", "models", "tasks", "runs", "dashboard", "devices", "certs"),
)
"""Modules of `fedbpt.cli`. Each defines a function of the same name or, for a command group, ``app``.

Names that are Python keywords end in ``_`` there.
"""

INTERRUPTED = 130
_COMPLETION_VARIABLE = "_FEDBPT_COMPLETE"
_RESUMABLE = (["demo"], ["tune"], ["models", "pull"])

# Some versions of typer vendor click, others use the installed one: take the classes from whichever it uses.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"fedbpt {VERSION}")
        raise typer.Exit


def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""
    del version, debug  # handled by its callback and by `main`
    help_without_command(context)


def make_app(wanted: str | None = None) -> typer.Typer:
    """Build the command line with only the command ``wanted``, to save memory; with all if it is None or unknown."""
    app = typer.Typer(
        name="fedbpt",
        help="Federated black-box prompt tuning: adapt an LLM across devices that keep their data.\n\n"
        "Example: fedbpt demo",
        context_settings={"help_option_names": ["-h", "--help"]},  # inherited by the commands
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(options)
    for name in [wanted] if wanted in COMMANDS else COMMANDS:
        spelled = f"{name}_" if iskeyword(name) else name
        module = import_module(f"fedbpt.cli.{spelled}")
        if hasattr(module, "app"):
            app.add_typer(module.app)
        else:
            app.command(name)(getattr(module, spelled))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``fedbpt`` program. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    repair_streams()
    if _COMPLETION_VARIABLE in os.environ:
        _complete()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # accepted in any position
    given = _with_default_address([word for word in given if word != "--debug"])
    code = 0
    warnings.filterwarnings("ignore", category=ModelWarning)  # commands print a model's notes themselves
    if logging.lastResort is not None:  # the handler that writes log records to the terminal
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        with _terminated_as_interrupted():
            _run(given)
            sys.stdout.flush()  # so that a full disk or a broken pipe is reported below
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort, RunStopped) as stop:
        echo(f"fedbpt: {_stop_message(given, committed=isinstance(stop, RunStopped))}", err=True)
        code = INTERRUPTED
    except _ClickException as error:
        echo(f"fedbpt: {_usage_message(error)}", err=True)
        code = error.exit_code
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        echo(f"fedbpt: {_error_message(error)}", err=True)
        code = error.exit_code if isinstance(error, FedbptError) else 1
    sys.exit(code)


def _complete() -> None:
    """Print shell completions, as the script installed by ``fedbpt --install-completion`` requests, and exit."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    command = typer.main.get_command(make_app(next(iter(typed.split()[1:]), None)))
    command.main(args=[], prog_name="fedbpt")  # this exits


def _run(given: Sequence[str]) -> None:
    # Do not call the app itself: versions of typer differ in how it handles Ctrl-C.
    wanted = next((word for word in given if not word.startswith("-")), None)
    command = typer.main.get_command(make_app(wanted))
    with command.make_context("fedbpt", list(given)) as context:
        command.invoke(context)


def _with_default_address(given: Sequence[str]) -> list[str]:
    """Add the default HOST:PORT to a ``--dashboard`` without one: typer has no options with an optional value."""
    words = []
    for word, following in pairwise([*given, ""]):
        is_bare = word == "--dashboard" and not re.fullmatch(r"\S+:\d+", following)
        words.append(f"{word}={DEFAULT_ADDRESS}" if is_bare else word)
    return words


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def _stop_message(given: Sequence[str], committed: bool) -> str:
    """The message after an interruption, with the command that resumes.

    ``committed``: the new run has rounds in the store, so the command must not repeat ``--fresh``.
    """
    if not any(list(given[: len(command)]) == command for command in _RESUMABLE):
        return "stopped"
    again = shlex.join(word for word in given if not (committed and word == "--fresh"))
    return f"stopped; to resume: fedbpt {again}"


def _usage_message(error: Any) -> str:
    # Some versions of typer prefix messages with "Value error".
    message = " ".join(str(error.format_message()).split()).replace("Value error, ", "")
    context = error.ctx if isinstance(error, _UsageError) else None
    return message if context is None else f"{message.rstrip('.')}: see `{context.command_path} --help`"


def _error_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FedbptError):
        if error.strerror.startswith("No usable temporary directory"):  # from `tempfile`
            return "no writable folder for temporary files: set TMPDIR to one"
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "home directory" in text:  # from `pathlib`
        return "this user has no home folder: set HOME to one"
    if isinstance(error, FedbptError):
        return text
    return f"unexpected {type(error).__name__}: {text} (a bug in fedbpt: --debug shows the traceback)"


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that devices are notified and child processes ended.

    Also works in background jobs of a shell script, which start with SIGINT ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
