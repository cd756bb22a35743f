"""Let glibc keep the memory of freed tensors, instead of returning it to the system in every step.

By default glibc serves large requests with mmap and returns their pages when they are freed, and it trims the end of
the heap. Activations are freed and allocated in every step, so the kernel then maps and clears the same pages again.

PyTorch asks for aligned memory. Before glibc 2.38 such a request is not served from a freed block of exactly its size
if small objects occupy both neighbours, so a single freed buffer is not always used again. The buffers of a training
step have many sizes; docs/results/bench/rows.md has the page faults of real steps.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP_BYTES, TRIM_BYTES = 1 << 30, (1 << 31) - 1

USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables with which users configure or replace the allocator. They are left in charge."""


def keep_buffers(environment: Mapping[str, str] = os.environ) -> bool:
    """Raise glibc's thresholds for this process. Returns whether it was done: not with another C library or allocator,
    nor if one of `USERS_OWN` is set.
    """
    if not sys.platform.startswith("linux") or any(environment.get(name) for name in USERS_OWN):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES) == 1
    return library.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES) == 1 and kept
