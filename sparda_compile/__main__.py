"""`python -m sparda_compile`: the command line."""

from __future__ import annotations

from sparda_compile.cli.main import main

if __name__ == "__main__":
    main()
