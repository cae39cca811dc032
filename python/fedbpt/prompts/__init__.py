"""The result: a prompt file and its model card."""
