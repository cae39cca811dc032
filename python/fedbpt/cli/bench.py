"""``fedbpt bench``: measure this machine with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from fedbpt import models, tasks
from fedbpt.bench.comparison import compare, read_measurement
from fedbpt.bench.measurement import Measurement, Rate, ThreadRate, best_threads, measure, measure_threads
from fedbpt.cli.hint import print_hint
from fedbpt.cli.models import progress_bar
from fedbpt.cli.options import AsJson, GpuLayers, GpuName, Quiet, Threads
from fedbpt.coordinator.costs.estimate import project
from fedbpt.display.console import human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.native_scorer import load_model
from fedbpt.machine.info import Heat
from fedbpt.plain_text import echo


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from `fedbpt models list`, or a .gguf file.")
    ] = "smollm2-135m",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer calls, and no comparison of thread counts: about 10 seconds.")
    ] = False,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Compare two outputs of --json instead of measuring.", metavar="A B"),
    ] = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine with a model: speed, memory, and energy where available. Takes about 40 seconds.

    Without --threads, it finds the fastest number of threads first.

    Example: fedbpt bench --model smollm2-135m --json > here.json
    """
    if compared is not None:
        _compare(compared, as_json)
        return
    shown = not (quiet or as_json)
    if model in models.CATALOGUE:
        with progress_bar(model, shown) as progress:
            models.pull(model, progress)
    console = PlainConsole(stderr=True, quiet=not shown)
    with console.status("") as status:

        def show(part: str) -> None:
            status.update(Text(f"measuring: {part}"))

        by_threads: tuple[ThreadRate, ...] = ()
        if threads is None and not quick and not gpu_layers:
            by_threads = measure_threads(lambda n_threads: load_model(model, n_threads=n_threads), on_part=show)
            threads = best_threads(by_threads)
        scorer = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu)
        found = measure(scorer, quick=quick, threads=by_threads, on_part=show)
    found = msgspec.structs.replace(found, projection=project(found, tasks.load("ag-news")))
    if as_json:
        echo(msgspec.json.encode(found).decode())
    else:
        _print(found)
        print_hint(scorer, shown)


def _print(found: Measurement) -> None:
    console = PlainConsole()
    machine = " ".join(part for part in (found.board, found.cpu, found.machine) if part)
    _line(console, f"{machine}, {found.n_physical_cores} cores, {human_bytes(found.ram_bytes)} RAM")
    weights = ", ".join(f"{100 * share:.0f} % {name}" for name, share in found.weights.items())
    _line(
        console,
        f"{found.model} ({weights}), {found.backend}, threads: {found.n_threads}, fedbpt {found.fedbpt_version}",
    )
    table = Table(box=None)
    for heading in ("", "work", "tokens/s", "eval./s", "J/eval.", "W"):
        table.add_column(heading, justify="left" if heading in ("", "work") else "right", no_wrap=True)
    batches = [("", rate) for rate in found.batches]
    for name, rate in [("prefill", found.prefill), *batches, ("cue", found.cue), ("front", found.front)]:
        evaluations = f"{rate.evaluations_per_second:,.2f}" if rate.work.n_prompt else "-"
        joules = "-" if rate.joules_per_evaluation is None else f"{rate.joules_per_evaluation:,.2f}"
        watts = "-" if rate.watts is None else f"{rate.watts:,.1f}"
        table.add_row(name, _work(rate), f"{rate.tokens_per_second:,.0f}", evaluations, joules, watts)
    console.print(table)
    if found.threads:
        rates = ", ".join(f"{rate.n_threads}: {rate.tokens_per_second:,.0f}" for rate in found.threads)
        _line(console, f"tokens/s by threads: {rates}; fastest with {found.best_threads}")
    memory = ", ".join(f"{name.replace('_', ' ')} {human_bytes(size)}" for name, size in found.memory_bytes.items())
    _line(console, f"memory: {memory}")
    _line(console, f"energy: {found.energy_source or found.energy_note}")
    _line(console, f"heat: {_heat(found.heat_before)} before, {_heat(found.heat_after)} after")
    kernels = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in found.kernel_flops_per_second.items())
    own = ""
    if found.weights_flops_per_second is not None:
        own = f", this model's {found.weights_flops_per_second / 1e9:,.0f}"
    _line(console, f"matrix kernels, GFLOP/s per thread: {kernels}; fastest {found.best_format}{own}")
    if found.projection is not None:
        run = found.projection
        _line(
            console,
            f"projected: {run.evaluations} evaluations on {run.rows} rows of {run.task} ({run.tokens:,} tokens), "
            f"the default run on this machine: at most {run.seconds / 60:,.1f} min",
        )


def _compare(paths: tuple[Path, Path], as_json: bool) -> None:
    found = compare(*map(read_measurement, paths))
    if as_json:
        comparison = {"figures": found.figures, "ratios": found.ratios(), "notes": found.notes}
        echo(msgspec.json.encode(comparison).decode())
        return
    console = PlainConsole()
    table = Table(box=None)
    for heading in ("", *(path.stem for path in paths), "ratio"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    ratios = found.ratios()
    for name, values in found.figures.items():
        ratio = f"{ratios[name]:.2f}" if name in ratios else "-"
        table.add_row(name, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values), ratio)
    console.print(table)
    for note in found.notes:
        _line(console, f"note: {note}")


def _line(console: PlainConsole, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _work(rate: Rate) -> str:
    work = rate.work
    if not work.n_prompt:
        return f"{work.texts} text{'s' if work.texts > 1 else ''} of {work.text_tokens} tokens"
    return f"{work.candidates} prompts of {work.n_prompt} on {work.texts} texts of {work.text_tokens} tokens"


def _heat(heat: Heat) -> str:
    celsius = "temperature unknown" if heat.celsius is None else f"{heat.celsius:.0f} °C"
    return f"{celsius} (throttled)" if heat.limited else celsius
