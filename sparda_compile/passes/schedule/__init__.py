"""Decide where and when transfers run."""
