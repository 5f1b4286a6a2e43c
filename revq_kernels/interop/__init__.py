"""What lets other people's models use the fused search; nothing here is imported, or patched, until it is asked for."""
