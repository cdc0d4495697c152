"""``python -m segfuse``: the same as the command ``segfuse``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
