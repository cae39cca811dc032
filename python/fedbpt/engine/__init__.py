"""The model: scoring texts under soft prompts, and text generation."""
