"""Images, VAEs, latents and tokens on disk."""
