"""A step as it was measured."""
