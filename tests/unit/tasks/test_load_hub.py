"""AG News and SST-2 with `datasets`: real local files, and the names requested from the hub."""

import sys

import pytest

from fedbpt import tasks
from fedbpt.errors import DataError, MissingExtraError
from tests.support.raises import raises

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

ROWS = {"sentence": ["too fluffy", "lovely"], "label": [0, 1]}
READ = [("too fluffy", 0), ("lovely", 1)]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def dataset():
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    return datasets.Dataset.from_dict(ROWS, features=features)


def test_a_parquet_file_is_read(tmp_path, dataset):
    dataset.to_parquet(tmp_path / "s.parquet")
    assert tasks.load_hub(tasks.load("sst-2"), source=tmp_path / "s.parquet") == READ


@pytest.mark.parametrize("name", ["s.jsonl", "s.NDJSON"])
def test_lines_of_json_are_read(tmp_path, dataset, name):
    dataset.cast_column("label", datasets.Value("int64")).to_json(tmp_path / name)
    assert tasks.load_hub(tasks.load("sst-2"), source=tmp_path / name) == READ


def test_a_saved_folder_is_read_by_split(tmp_path, dataset):
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    assert tasks.load_hub(tasks.load("sst-2"), "train", tmp_path / "saved") == READ
    with raises(DataError, field="split") as caught:
        tasks.load_hub(tasks.load("sst-2"), "test", tmp_path / "saved")
    assert "'test'" in str(caught.value)
    assert "train" in str(caught.value)


def test_a_data_set_object_is_taken_as_rows(dataset):
    assert tasks.to_rows(dataset, tasks.load("sst-2")) == READ


@pytest.mark.parametrize(
    ("task", "split", "asked"),
    [
        ("ag-news", "test", ("fancyzhx/ag_news", None, "test")),
        ("sst-2", "train", ("nyu-mll/glue", "sst2", "train")),
        ("sst-2", "test", ("nyu-mll/glue", "sst2", "validation")),
    ],
)
def test_a_tasks_own_data_set_is_requested_from_the_hub(monkeypatch, task, split, asked):
    calls = []

    def load_dataset(name, configuration=None, *, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tasks.load_hub(tasks.load(task), split) == [("a", 1), ("b", 0)]
    assert calls == [asked]


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with raises(DataError) as caught:
        tasks.load_hub(tasks.load("sst-2"), source=tmp_path / "broken.parquet")
    assert "broken.parquet" in str(caught.value)
    with raises(DataError, field="source"):
        tasks.load_hub(tasks.load("bbc-news"))


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[data\]"):
        tasks.load_hub(tasks.load("sst-2"))
