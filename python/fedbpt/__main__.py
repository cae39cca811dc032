"""``python -m fedbpt``: the ``fedbpt`` command."""

from fedbpt.cli import main

main()
