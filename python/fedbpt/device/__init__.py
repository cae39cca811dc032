"""The device's side of a federation: its rows, its model, its work."""
