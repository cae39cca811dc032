"""A run while it goes on, and after: progress, figures, events, the report."""
