"""The shape of all KV state."""
