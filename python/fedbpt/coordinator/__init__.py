"""The coordinator's part: rounds over a fleet, and the server for devices that call in."""
