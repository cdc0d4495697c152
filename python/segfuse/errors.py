"""What users did wrong, said in one line."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Input that cannot be worked with: a file, a folder or an option.

    The text is one line: what is wrong with which, and where possible what to do.
    """
