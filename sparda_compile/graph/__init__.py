"""Graphs: nodes, what they do, and how they are written."""
