"""Progress and results in a terminal or a notebook."""
