"""The version; the package metadata is built from it."""

VERSION = "0.1.0"
