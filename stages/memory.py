"""How this process's memory allocator behaves."""

import ctypes

# mallopt parameters, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets glibc reuse freed memory instead of giving it back to the kernel.

    By default every large array is mapped anew and faults in page by page, which can cost more than filling it. For processes
    that allocate the same large arrays over and over: encoders, trainers. Nothing happens with another C library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
