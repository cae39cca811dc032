"""``python -m fedbpt``, the same as the ``fedbpt`` command."""

from fedbpt.cli import main

main()
