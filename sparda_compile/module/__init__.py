"""What `optimize` returns."""
