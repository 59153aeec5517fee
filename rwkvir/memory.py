"""How the process treats its memory on the CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = 2**30  # bytes of a tensor that is kept


def keep_freed() -> None:
    """Keep what tensors of up to 1 GiB give back for the next ones, where the C library is glibc.

    By default, glibc returns blocks of 32 MiB and more to the system and is handed them again page by page: more than
    half of the time of a network on a large picture. The price is up to half as much memory again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST - 1)
