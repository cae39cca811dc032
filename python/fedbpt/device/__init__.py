"""A device's part: its rows, its model, its work."""
