"""One file for each family of quantizers."""
