"""How the bytes of a full block are written: one file for each format, named in `registry`."""
