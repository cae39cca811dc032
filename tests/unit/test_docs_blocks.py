"""Code blocks of the pages: commands are parsed, data files are read. `tests.integration` runs the Python."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer
import yaml

from fedbpt import cli, tasks
from fedbpt.protocol import codec
from fedbpt.runs.event_log import Entry
from fedbpt.runs.run_file import load_config
from tests.support.printed import Block, blocks, commands, programs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md", "vendor/llama.cpp/*.md")
    for path in ROOT.glob(pattern)
)

LANGUAGES: Final = {"console", "python", "toml", "json", "yaml", "text"}

NOT_CHECKED: Final = {
    "system packages": {"apt", "apt-get", "pkg", "proot-distro"},
    "the shell, and programs of the system": {".", "cd", "cp", "curl", "export", "ln", "scp", "tar"},
    "builds of Python and of the CUDA back end": {"./configure", "cmake", "make -j4", "make install"},
    "Flower's own commands, run by tests.flower": {"flower-superlink", "flower-supernode", "flwr"},
    "needs the network": {"uv"},
}
"""Programs whose arguments are not checked, by reason."""


def test_every_unchecked_program_is_used() -> None:
    printed = {words[0] for page in PAGES for words in printed_programs(page)} | {"make -j4", "make install"}
    assert set().union(*NOT_CHECKED.values()) - printed == set()


def printed_programs(page: Path) -> Iterator[list[str]]:
    for block in blocks(page.read_text()):
        if block.language == "console":
            for _, command in commands(block):
                yield from programs(command)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(*languages: str) -> list[Any]:
    """The blocks in these languages, each as a test's parameter."""
    return [
        pytest.param(block, id=f"{by_name(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page.read_text()))
        if block.language in languages
    ]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_has_a_language(page: Path) -> None:
    found = blocks(page.read_text())
    assert {block.language for block in found} <= LANGUAGES
    assert len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) == 2 * len(found)


def leaves(command: Any) -> Iterator[Any]:
    """The commands below a group, or the command itself."""
    if hasattr(command, "commands"):
        for below in command.commands.values():
            yield from leaves(below)
    else:
        yield command


def parse(words: list[str]) -> str:
    """Parse arguments of ``fedbpt`` without running the command; returns the command's name."""
    program: Any = typer.main.get_command(cli.make_app(words[0]))
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda **_: called.append(name)

    for command in leaves(program):
        command.callback = note(command.name)
    program.main(cli._with_default_address(words), prog_name="fedbpt", standalone_mode=False)
    return called[0]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_printed_command_is_valid(page: Path) -> None:
    for words in printed_programs(page):
        name, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
        if name == "fedbpt":
            parse(arguments)
        elif " ".join(words[:2]) in set().union(*NOT_CHECKED.values()) or name in set().union(*NOT_CHECKED.values()):
            continue
        elif name == "make":
            check_target(arguments[0])
        elif name == "pip":
            check_extras(arguments)
        else:
            assert re.fullmatch(r"(.*/)?python3?", name), f"{by_name(page)}: {' '.join(words)}"
            check_script(arguments)


def test_an_option_that_does_not_exist_is_found() -> None:
    assert parse(["models", "pull", "smollm2-135m", "--quiet"]) == "pull"
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["models", "pull", "smollm2-135m", "--no-such-option"])
    with pytest.raises(Exception, match="no-such-command"):
        parse(["models", "no-such-command"])


def check_target(target: str) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert target in phony[1].split()


def check_extras(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = re.findall(r"(?:fedbpt|\.)\[([a-z,]+)\]", " ".join(arguments))
    assert {name for found in extras for name in found.split(",")} <= set(known)


def check_script(arguments: list[str]) -> None:
    """A script has the options it is called with. Modules and inline code are not checked."""
    if not arguments[0].endswith(".py"):
        assert arguments[0] in {"-m", "-c"}
        return
    text = (ROOT / arguments[0]).read_text()
    assert [option for option in arguments[1:] if option.startswith("--") and f'"{option}"' not in text] == []


@pytest.mark.parametrize("block", blocks_of("toml"))
def test_every_toml_block_is_a_run_file_or_a_task_file(block: Block, tmp_path: Path) -> None:
    values = tomllib.loads(block.text)
    path = tmp_path / "printed.toml"
    if "templates" in values:
        path.write_text(block.text)
        assert tasks.load(path).name == values["name"]
        return
    # Some pages show a part of a run file, and some use the task file of the tutorials.
    text = block.text if "task" in values else f'task = "ag-news"\n{block.text}'
    path.write_text(text)
    (tmp_path / "support.toml").write_text((ROOT / "docs/tutorials/support/support.toml").read_text())
    load_config(path)


@pytest.mark.parametrize("block", blocks_of("json"))
def test_every_json_block_is_json_lines(block: Block) -> None:
    for line in block.text.splitlines():
        if "event" in json.loads(line):
            codec.decode_json(line.encode(), Entry)


@pytest.mark.parametrize("block", blocks_of("yaml"))
def test_every_yaml_block_can_be_read(block: Block) -> None:
    assert yaml.safe_load(block.text)


@pytest.mark.parametrize("block", blocks_of("python"))
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, "printed", "exec")


def options_of(words: list[str]) -> set[str]:
    """The options of the command that ``words`` name, and of the groups above it."""
    command: Any = typer.main.get_command(cli.make_app(words[0]))
    found = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        found |= {option for parameter in command.params for option in parameter.opts}
    return found


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_in_the_text_has_the_options_it_is_named_with(page: Path) -> None:
    """These may be incomplete, so they are not parsed."""
    for span in re.findall(r"`(fedbpt [a-z][^`]*)`", page.read_text()):
        words = span.split()[1:]
        assert words[0] in cli.COMMANDS, span
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used - options_of(words) - {"-h", "--help"} == set(), span
