"""What the commands that look before training make of what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefopt.records import InputError


@contextmanager
def readable() -> Iterator[None]:
    """InputError, naming the file, where the system lets none be read: no rights, a name that is too long."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise InputError(f"{str(error.filename)[:200]}: cannot be read: {error.strerror}") from None


def memory_of(gigabytes: float | None) -> int | None:
    """--memory in bytes. InputError unless it is a size."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 10**9:  # NaN too
        raise InputError(f"--memory {gigabytes:g}: give the gigabytes that a run may take, such as 16")
    return round(gigabytes * 10**9)
