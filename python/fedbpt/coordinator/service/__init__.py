"""A coordinator that stays up: its HTTP server, and the runs that are handed in."""
