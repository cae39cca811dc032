"""CMA-ES over latents, and how a latent becomes a prompt."""
