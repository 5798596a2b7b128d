"""All threads of our long-lived processes share one heap: what one frees, another uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As a service runs; its threads allocate, each for itself.
IN_THREADS = """
import ctypes, threading
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
found, barrier = [], threading.Barrier(4)

def allocate():
    barrier.wait()  # all live at once: none takes up the heap of one that has ended
    found.append(malloc(1000))
    barrier.wait()

def use_threads():
    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if line.rstrip().endswith("[heap]"))
    first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
    print(sum(first <= address < last for address in found))
"""
SERVICE = """
from blockrepl.services.foreground import run_foreground

async def service(ready):
    use_threads()

run_foreground(service)
"""


@pytest.mark.parametrize(("start", "shared"), [("use_threads()", 0), (SERVICE, 4)])
def test_threads_of_a_service_share_its_heap(start: str, shared: int) -> None:
    # Guards share_one_heap in run_foreground; the first row shows that others do not.
    command = [sys.executable, "-c", IN_THREADS + start]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == shared
