"""What crosses the wire: messages, their encoding, and what both sides must agree on. Nothing here computes."""
