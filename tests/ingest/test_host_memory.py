"""Is freed memory used again, and given back at the end? Counted in page faults and resident pages of a process of its own."""

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")

_SCRIPT = """
import ctypes, json, resource
from actstore.ingest.host_memory import keep_freed_memory, release_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 48 << 20  # beyond glibc's own dynamic threshold of 32 MiB

def churn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(SIZE)
        ctypes.memset(block, 1, SIZE)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

usual = churn()
keep_freed_memory()
kept, held = churn(), resident()
release_freed_memory()
print(json.dumps({"usual": usual, "kept": kept, "held": held, "released": resident(), "after": churn()}))
"""


def test_blocks_are_used_again_until_released() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    pages = (48 << 20) // 4096
    # Huge pages may back a block: then even fresh ones cost few faults, and there is nothing to compare.
    if found["usual"] > 10 * pages:
        assert found["kept"] < found["usual"] / 5
        assert found["after"] > found["usual"] / 2
    assert found["held"] - found["released"] > 32 << 20
