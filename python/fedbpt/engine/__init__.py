"""The model: scores of tokens with soft prompts, and generated text."""
