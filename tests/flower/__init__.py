"""Tests of the Flower integration; `make test-flower` runs them in a separate environment."""

import pytest

pytest.importorskip("flwr", reason="Flower is in a separate environment: make test-flower")
