"""Fixture of processes that end with their test."""

from tests.integration.conftest import fleet

__all__ = ["fleet"]
