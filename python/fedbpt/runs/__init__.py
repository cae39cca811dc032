"""Settings, events and stored runs."""
