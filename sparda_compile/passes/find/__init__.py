"""Find what is to be rewritten."""
