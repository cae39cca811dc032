"""CMA-ES over latents, and the projection of a latent to a prompt."""
