"""A child writes to shared memory and is gone, all between two checkpoints. The directory of the
argument has what this waits for."""

import mmap
import os
import sys
import time

memory = mmap.mmap(-1, 1 << 20)
memory[0:4] = b"old!"


def until(name):
    while not os.path.exists(os.path.join(sys.argv[1], name)):
        time.sleep(0.005)


print("ready", flush=True)
until("fork")
pid = os.fork()
if pid == 0:
    print("born", flush=True)
    until("write")
    memory[4096:4100] = b"new!"
    os._exit(0)
os.waitpid(pid, 0)
print("gone", flush=True)
until("read")
print("found", memory[0:4] + memory[4096:4100], flush=True)
while True:
    time.sleep(1)
