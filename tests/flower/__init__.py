"""Flower's tests: `make test-flower` runs them, in an environment that has it."""

import pytest

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")
