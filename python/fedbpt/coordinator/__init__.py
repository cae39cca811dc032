"""The coordinator: rounds over a fleet of devices, and the server for devices that call in."""
