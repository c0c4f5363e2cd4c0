"""From a captured forward to a program that runs."""
