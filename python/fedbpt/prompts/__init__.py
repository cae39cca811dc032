"""The result of tuning: a prompt file and its model card."""
