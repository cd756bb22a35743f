"""The allocator of a rank keeps freed buffers."""

import platform
import subprocess
import sys

import pytest

from headway.launcher.train.allocator import USERS_OWN, keep_buffers

FAULTS = """
import resource, sys
import torch
from headway.launcher.train.allocator import keep_buffers
if sys.argv[1] == "keep":
    assert keep_buffers({})
SIZE = 1 << 24  # 64 MiB, above the largest size that glibc would learn to keep by itself
LESS = 1 << 18
kept = []
def buffer(number):
    # Each is 1 MiB smaller than the last one: before glibc 2.38 a freed block does not serve an aligned request of
    # its own size, only a smaller one, unless its neighbours are free too.
    torch.ones(SIZE + (15 - number) * LESS)
    kept.append(torch.ones(16))  # occupies a place beside the block
for number in range(10):
    buffer(number)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(10, 15):
    buffer(number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults(how: str) -> int:
    """Page faults of five allocations of a freed buffer's size, in a process of its own."""
    words = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(words, env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_a_freed_buffer_is_used_again_without_page_faults():
    assert faults("keep") < 100
    assert faults("default") > 1000


@glibc
@pytest.mark.parametrize("name", USERS_OWN)
def test_users_settings_of_the_allocator_are_left_alone(name):
    assert not keep_buffers({name: "x"})
