"""Reads files past the page cache, and says whether what it has read is what it has in memory. The
directory of the first argument has what this waits for; the rest are the file, how it is opened, the kind
of memory and what is done."""

import mmap
import os
import random
import sys
import threading
import time

PAGE = 4096
PAGES = 16
directory, path, how, kind, what = sys.argv[1:]
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def until(name):
    while not os.path.exists(os.path.join(directory, name)):
        time.sleep(0.002)


def mapped(pages):
    flags = private if kind == "private" else mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, pages * PAGE, flags=flags)


def block(number):
    """What the file has there."""
    return bytes([number % 251 + 1]) * PAGE


def opened():
    return os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))


def read_once():
    """One read, which whoever serves the file answers when the test says so."""
    memory = mapped(PAGES)
    memory[:] = b"o" * len(memory)
    print("ready", flush=True)
    until("read")
    file = opened()
    reader = threading.Thread(target=lambda: os.preadv(file, [memory], 0))
    reader.start()
    if what == "closed":
        until("close")
        os.close(file)
        print("closed", flush=True)
    reader.join()
    print("done", flush=True)
    until("look")
    expected = b"".join(block(number) for number in range(PAGES))
    print("found", "all" if memory[:] == expected else "something else", flush=True)


def read_always():
    """Reads and writes without end: whatever a checkpoint has is whole."""
    memory, first, second = mapped(PAGES), mapped(64), mapped(64)
    # Much that does not change.
    ballast = mapped(8192)
    ballast[:] = b"b" * len(ballast)
    file, has = opened(), [None] * PAGES
    chance = random.Random(1)
    print("ready", flush=True)
    until("read")
    while not os.path.exists(os.path.join(directory, "look")):
        slot, number = chance.randrange(PAGES), chance.randrange(1000)
        has[slot] = None
        place = memoryview(memory)[slot * PAGE : (slot + 1) * PAGE]
        assert os.preadv(file, [place], number * PAGE) == PAGE
        has[slot] = number
        page, value = chance.randrange(64), bytes([chance.randrange(256)]) * PAGE
        for copy in first, second:
            copy[page * PAGE : (page + 1) * PAGE] = value
        if number % 50 == 0:
            # Something comes where something went.
            second.close()
            second = mapped(64)
            second[:] = first[:]
    whole = first[:] == second[:] and ballast[:] == b"b" * len(ballast)
    for slot, number in enumerate(has):
        if number is not None:
            whole &= memory[slot * PAGE : (slot + 1) * PAGE] == block(number)
    print("found", "all" if whole else "something else", flush=True)


read_always() if what == "always" else read_once()
while True:
    time.sleep(1)
