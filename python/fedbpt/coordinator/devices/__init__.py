"""The devices of a run: who may call in, whom a round asks, how long it waits, and sums that hide them."""
