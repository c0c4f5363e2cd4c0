"""Check that a program is legal and has no race."""
