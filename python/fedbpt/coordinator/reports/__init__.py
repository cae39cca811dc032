"""The reports of a round: what is read from them, and which may be committed."""
