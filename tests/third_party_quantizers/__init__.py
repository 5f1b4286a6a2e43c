"""Quantizers of repositories that are not packages, restated: separate, a file each, as classes there share names."""
