"""``fedbpt serve``: serve a model and its tuned prompts with OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedbpt import tasks
from fedbpt.cli.credentials import token_in
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import AllowInsecure, AsJson, Cert, GpuLayers, GpuName, Key, Model, Quiet, Threads
from fedbpt.engine.native_scorer import load_model
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.prompts.prompt import Prompt
from fedbpt.serving import ModelServer, served_models

PromptFiles = Annotated[list[Path] | None, typer.Option("--prompt", "-p", help="A tuned prompt's file; repeatable.")]
TaskFiles = Annotated[
    list[str] | None,
    typer.Option("--task", "-t", help="A task file to use instead of the one in the prompt file; repeatable."),
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="Require clients to send the token in this file; created if absent.")
]

Origins = Annotated[
    list[str] | None,
    typer.Option("--cors", metavar="ORIGIN", help="Allow calls from web pages of this origin; repeatable; *: all."),
]


def serve(
    model: Model,
    prompts: PromptFiles = None,
    task: TaskFiles = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any free one.")] = 8411,
    token_file: TokenFile = None,
    cors: Origins = None,
    cert: Cert = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Serve a model and its tuned prompts with OpenAI's API: completions, chat, streaming. Each prompt is a model.

    Example: fedbpt serve --model smollm2-135m --prompt prompt.safetensors
    """
    loaded = [Prompt.load(path) for path in prompts or []]
    known = {found.name: found for found in map(tasks.load, task or [])}
    token = token_in(token_file) if token_file else None
    tls = Tls(cert, key)
    scorer = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu)
    served = served_models(scorer, loaded, known)
    print_hint(scorer, shown=not (quiet or as_json))

    def ready(url: str) -> None:
        if as_json:
            echo(json.dumps({"ready": {"url": url, "models": list(served)}}))
        elif not quiet:
            _print_ready(url, list(served))

    ModelServer(
        served, host, port, token=token, origins=cors or (), tls=tls, allow_insecure=allow_insecure, on_ready=ready
    ).run()


def _print_ready(url: str, names: Sequence[str]) -> None:
    echo(f"serving {', '.join(names)} at {url}/v1; Ctrl-C stops it")
