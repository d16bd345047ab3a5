"""The ground that every known problem stands on."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["NOT_WRITABLE", "FrugalError", "unwritable"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the system says of a disk that is full, and of folders in which nobody may write.
NOT_WRITABLE = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class FrugalError(Exception):
    """A problem that the kit knows: its message is one sentence that names the remedy.

    Each derives from it where it belongs, beside the built-in error that Python users expect.
    """


def unwritable(path: Path | str, error: OSError) -> str:
    """A sentence about a file or folder that cannot be written, with the remedy."""
    if error.errno in _FULL:
        return f"No space left for {path}; nothing was written: free some space and run again."
    return f"Cannot write {path} ({error.strerror or error}): check the folder's permissions."
