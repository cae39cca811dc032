"""Settings, events and the record of runs."""
