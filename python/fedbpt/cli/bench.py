"""``fedbpt bench``: how fast this machine is with a model."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fedbpt import models
from fedbpt.bench import Measurement, Rate, measure
from fedbpt.cli.hint import print_hint
from fedbpt.cli.models import progress_bar
from fedbpt.cli.options import AsJson, GpuLayers, GpuName, Quiet, Threads
from fedbpt.display import human_bytes
from fedbpt.machine import Heat
from fedbpt.native_scorer import load_model


def bench(
    model: Annotated[str, typer.Argument(help="A name from `fedbpt models list`, or a .gguf file.")] = "smollm2-135m",
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine with a model: speed, memory, and energy where the system tells. Some 20 seconds.

    Example: fedbpt bench smollm2-135m --json
    """
    shown = not (quiet or as_json)
    if model in models.CATALOGUE:
        with progress_bar(model, shown) as progress:
            models.pull(model, progress)
    scorer = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu)
    console = Console(stderr=True, quiet=not shown)
    with console.status("") as status:
        found = measure(scorer, on_part=lambda part: status.update(f"measuring: {part}"))
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        _print(found)
        print_hint(scorer, shown)


def _print(found: Measurement) -> None:
    console = Console()
    machine = " ".join(part for part in (found.board, found.cpu, found.machine) if part)
    _line(console, f"{machine}, {found.n_physical_cores} cores, {human_bytes(found.ram_bytes)} RAM")
    weights = ", ".join(f"{100 * share:.0f} % {name}" for name, share in found.weights.items())
    _line(
        console,
        f"{found.model} ({weights}), {found.backend}, threads: {found.n_threads}, fedbpt {found.fedbpt_version}",
    )
    table = Table(box=None)
    for heading in ("", "work", "tokens/s", "eval./s", "J/eval."):
        table.add_column(heading, justify="left" if heading in ("", "work") else "right", no_wrap=True)
    for name, rate in {"prefill": found.prefill, "cue": found.cue, "front": found.front}.items():
        evaluations = "-" if name == "prefill" else f"{rate.evaluations_per_second:,.2f}"
        joules = "-" if rate.joules_per_evaluation is None else f"{rate.joules_per_evaluation:,.2f}"
        table.add_row(name, _work(rate), f"{rate.tokens_per_second:,.0f}", evaluations, joules)
    console.print(table)
    memory = ", ".join(f"{name.replace('_', ' ')} {human_bytes(size)}" for name, size in found.memory_bytes.items())
    _line(console, f"memory: {memory}")
    _line(console, f"energy: {found.energy_source or found.energy_note}")
    _line(console, f"heat: {_heat(found.heat_before)} before, {_heat(found.heat_after)} after")
    kernels = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in found.kernel_flops_per_second.items())
    _line(console, f"matrix kernels, GFLOP/s a thread: {kernels}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _work(rate: Rate) -> str:
    work = rate.work
    if not work.n_prompt:
        return f"1 text of {work.text_tokens} tokens"
    return f"{work.candidates} prompts of {work.n_prompt} on {work.texts} texts of {work.text_tokens} tokens"


def _heat(heat: Heat) -> str:
    celsius = "temperature unknown" if heat.celsius is None else f"{heat.celsius:.0f} °C"
    return f"{celsius} (slowed down)" if heat.limited else celsius
