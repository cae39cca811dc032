"""What crosses the wire: messages, their encoding, and conventions shared by both sides. No computation."""
