"""Programs that hold one kind of memory each, for ../memory.rs: python3 memory.py KIND

Each sets its kind up and pauses a few times; at a pause the test takes checkpoints and lets it go
on by making a file. After the last pause it runs elsewhere, and looks at all that it can read.
"""

import ctypes
import ctypes.util
import fcntl
import mmap
import os
import signal
import sys
import time

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
for name in ("munmap", "madvise", "mprotect", "mlock", "mlock2", "shmdt", "mremap"):
    getattr(libc, name).argtypes = None

steps = 0


def pause(word="ready"):
    """Waits until the test has taken its checkpoints."""
    global steps
    steps += 1
    print(word, steps, flush=True)
    while not os.path.exists(f"go-{steps}"):
        time.sleep(0.002)


def last():
    pause("last")


def same(what, got, wanted):
    if got != wanted:
        print(f"{what}: {got!r}, not {wanted!r}", flush=True)
        raise SystemExit(f"panicked: {what}: {got!r}, not {wanted!r}")


def call(name, *args):
    result = getattr(libc, name)(*args)
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


class Child:
    """A process that runs a function for each line it is told, and answers with what it gives."""

    def __init__(self, serve, before=None):
        down, up = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(down[1])
            os.close(up[0])
            if before:
                before()
            with os.fdopen(down[0]) as orders, os.fdopen(up[1], "w") as answers:
                for line in orders:
                    if line == "end\n":
                        break
                    print(serve(*line.split()), file=answers, flush=True)
            os._exit(0)
        os.close(down[0])
        os.close(up[1])
        self.orders, self.answers = os.fdopen(down[1], "w"), os.fdopen(up[0])

    def ask(self, *words):
        print(*words, file=self.orders, flush=True)
        return self.answers.readline().strip()

    def end(self):
        print("end", file=self.orders, flush=True)
        os.waitpid(self.pid, 0)


def at(memory):
    """A server that reads and writes bytes of shared memory."""

    def serve(verb, offset, value="0"):
        if verb == "set":
            memory[int(offset)] = int(value)
        return memory[int(offset)]

    return serve


def map_line(address):
    """The line of /proc/self/maps for an address."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            if start <= address < end:
                return line.split(maxsplit=5)
    return None


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def shared_anonymous():
    size = 64 * PAGE
    memory = mmap.mmap(-1, size)
    memory[0:5] = b"first"
    memory[10 * PAGE] = 10
    a, b = Child(at(memory)), Child(at(memory))
    same("a child's store", a.ask("set", 20 * PAGE, 20), "20")
    pause()
    # Stores of each process, one over the other's, and a page that is given back.
    a.ask("set", 10 * PAGE, 11)
    b.ask("set", 10 * PAGE + 1, 12)
    memory[30 * PAGE] = 30
    b.ask("set", 30 * PAGE, 31)
    pause()
    call("madvise", ctypes.c_void_p(address_of(memory) + 20 * PAGE), PAGE, mmap.MADV_REMOVE)
    # Processes that live between two checkpoints only.
    for i in range(3):
        short = Child(at(memory))
        short.ask("set", (40 + i) * PAGE, 40 + i)
        short.end()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    pause()
    a.ask("set", 5 * PAGE, 5)
    a.end()
    last()
    same("the start", memory[0:5], b"first")
    same("a's store", memory[10 * PAGE], 11)
    same("b's store", memory[10 * PAGE + 1], 12)
    same("b's store over mine", memory[30 * PAGE], 31)
    same("a page given back", memory[20 * PAGE], 0)
    same("short lives", [memory[(40 + i) * PAGE] for i in range(3)], [40, 41, 42])
    same("the store of one that ended", memory[5 * PAGE], 5)
    same("sight of b", b.ask("get", 5 * PAGE), "5")
    b.ask("set", 6 * PAGE, 66)
    same("shared still", memory[6 * PAGE], 66)
    line = map_line(address_of(memory))
    same("rights and name", (line[1], line[5].strip()), ("rw-s", "/dev/zero (deleted)"))
    late = Child(at(memory))
    late.ask("set", 7 * PAGE, 77)
    same("shared with new children", memory[7 * PAGE], 77)


def shared_anonymous_moves():
    """Parts unmapped, moved and mapped read-only; pages written before that stay."""
    size = 32 * PAGE
    memory = mmap.mmap(-1, size)
    child = Child(at(memory))
    base = address_of(memory)
    for i in range(32):
        memory[i * PAGE] = 100 + i
    pause()
    memory[3 * PAGE] = 33
    call("munmap", ctypes.c_void_p(base + 3 * PAGE), 2 * PAGE)
    call("mprotect", ctypes.c_void_p(base + 10 * PAGE), PAGE, mmap.PROT_READ)
    call("mprotect", ctypes.c_void_p(base + 11 * PAGE), PAGE, 0)
    pause()
    child.ask("set", 3 * PAGE, 34)
    child.ask("set", 4 * PAGE, 44)
    child.ask("set", 11 * PAGE, 111)
    last()
    same("unmapped here", map_line(base + 3 * PAGE), None)
    same("mapped there", child.ask("get", 3 * PAGE), "34")
    same("read-only", map_line(base + 10 * PAGE)[1], "r--s")
    same("no access", map_line(base + 11 * PAGE)[1], "---s")
    call("mprotect", ctypes.c_void_p(base + 10 * PAGE), 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    same("contents without access", memory[11 * PAGE], 111)
    memory[10 * PAGE] = 7
    same("writable again", child.ask("get", 10 * PAGE), "7")


def seals(fd):
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def memfd():
    fd = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * PAGE)
    os.fchmod(fd, 0o640)
    memory = mmap.mmap(fd, 16 * PAGE)
    private = mmap.mmap(fd, 16 * PAGE, mmap.MAP_PRIVATE)
    memory[0:4] = b"mapd"
    os.pwrite(fd, b"written", 5 * PAGE)
    private[PAGE : PAGE + 4] = b"mine"
    os.write(other, b"no mapping at all")
    child = Child(at(memory))
    pause()
    os.pwrite(fd, b"again", 6 * PAGE)
    child.ask("set", 7 * PAGE, 7)
    os.write(other, b", grown")
    late = os.memfd_create("late", os.MFD_ALLOW_SEALING)
    os.write(late, b"late" * 3000)
    pause()
    os.ftruncate(fd, 12 * PAGE)
    os.pwrite(fd, b"at the end", 12 * PAGE - 10)
    os.ftruncate(late, 5000)
    fcntl.fcntl(late, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    view = mmap.mmap(late, 5000, mmap.MAP_SHARED, mmap.PROT_READ)
    pause()
    os.lseek(other, 3, os.SEEK_SET)
    last()
    same("the mapping", memory[0:4], b"mapd")
    same("written by descriptor", memory[5 * PAGE : 5 * PAGE + 7], b"written")
    same("written again", os.pread(fd, 5, 6 * PAGE), b"again")
    same("a child's store", memory[7 * PAGE], 7)
    same("a private page", private[PAGE : PAGE + 4], b"mine")
    same("the page behind it", memory[PAGE : PAGE + 4], bytes(4))
    same("a private mapping's view", private[5 * PAGE : 5 * PAGE + 7], b"written")
    same("the end", os.pread(fd, 100, 12 * PAGE - 10), b"at the end")
    same("size", os.fstat(fd).st_size, 12 * PAGE)
    same("mode", os.fstat(fd).st_mode & 0o7777, 0o640)
    same("name", os.readlink(f"/proc/self/fd/{fd}"), "/memfd:a name (deleted)")
    same("offset", os.read(other, 100), b"mapping at all, grown")
    same("no seals allowed", seals(other), fcntl.F_SEAL_SEAL)
    same("seals allowed", seals(fd), 0)
    same("sealed", seals(late), fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    same("sealed contents", os.pread(late, 9000, 0), (b"late" * 3000)[:5000])
    same("a view of it", view[4990:5000], (b"late" * 3000)[4990:5000])
    os.pwrite(fd, b"x", 0)
    same("one object still", (memory[0], child.ask("get", 0)), (ord("x"), str(ord("x"))))


class Plain:
    """A mapping that keeps no descriptor, unlike that of the mmap module."""

    def __init__(self, fd, size, rights=mmap.PROT_READ | mmap.PROT_WRITE):
        self.address = call("mmap", None, size, rights, mmap.MAP_SHARED, fd, 0)
        self.bytes = (ctypes.c_ubyte * size).from_address(self.address)

    def __setitem__(self, at, value):
        self.bytes[at] = value

    def __getitem__(self, at):
        return self.bytes[at]

    def rights(self):
        return map_line(self.address)[1]

    def path(self):
        return os.path.basename(map_line(self.address)[5].rstrip("\n"))


def mapped_files():
    """Files by path. Before the restore the test takes `gone` away and spoils `stale`."""
    os.mkdir("gone")
    rights = os.O_RDWR | os.O_CREAT

    def make(path, size):
        fd = os.open(path, rights, 0o640)
        os.ftruncate(fd, size)
        return fd

    fd = make("gone/only mapped", 8 * PAGE)
    memory = Plain(fd, 8 * PAGE)
    os.close(fd)
    open_too = make("stale.new", 100 * PAGE)
    stale = Plain(open_too, 100 * PAGE)
    late_rights = Plain(open_too, 100 * PAGE, mmap.PROT_READ)
    fd = make("unlinked", 2 * PAGE)
    unlinked = Plain(fd, 2 * PAGE)
    os.close(fd)
    memory[0] = 1
    stale[PAGE] = 1
    unlinked[0] = 1
    child = Child(at(memory))
    pause()
    memory[PAGE] = 2
    child.ask("set", 2 * PAGE, 3)
    os.pwrite(open_too, b"by descriptor", 50 * PAGE)
    os.rename("stale.new", "stale")
    pause()
    stale[60 * PAGE] = 6
    unlinked[PAGE] = 5
    os.unlink("unlinked")
    os.ftruncate(open_too, 70 * PAGE + 10)
    os.lseek(open_too, 50 * PAGE + 3, os.SEEK_SET)
    pause()
    child.ask("set", 3 * PAGE, 4)
    last()
    same("stores", [memory[i * PAGE] for i in range(4)], [1, 2, 3, 4])
    same("mode", os.stat("gone/only mapped").st_mode & 0o7777, 0o640)
    with open("gone/only mapped", "rb") as file:
        contents = file.read()
    same("on the disk", [contents[i * PAGE] for i in range(4)], [1, 2, 3, 4])
    same("size", len(contents), 8 * PAGE)
    same("stores in what was there", (stale[PAGE], stale[60 * PAGE]), (1, 6))
    same("nothing else", bytes(stale.bytes[2 * PAGE : 40 * PAGE]), bytes(38 * PAGE))
    same("its size", os.stat("stale").st_size, 70 * PAGE + 10)
    same("by descriptor", os.read(open_too, 10), b"descriptor")
    same("another mapping", late_rights[60 * PAGE], 6)
    same("paths", (memory.path(), stale.path()), ("only mapped", "stale"))
    same("without a path", (unlinked[0], unlinked[PAGE]), (1, 5))
    same("no path", os.path.exists("unlinked"), False)
    same("rights", (memory.rights(), late_rights.rights()), ("rw-s", "r--s"))
    both = mmap.PROT_READ | mmap.PROT_WRITE
    call("mprotect", ctypes.c_void_p(late_rights.address), PAGE, both)
    late_rights[0] = 9
    same("one file still", (stale[0], os.pread(open_too, 1, 0)), (9, b"\t"))
    child.ask("set", 4 * PAGE, 44)
    same("shared still", memory[4 * PAGE], 44)


def deleted_files():
    with open("shared", "wb") as file:
        file.write(b"s" * 3 * PAGE)
    os.chmod("shared", 0o604)
    with open("library", "wb") as file:
        file.write(b"l" * 2 * PAGE)
    shared = os.open("shared", os.O_RDWR)
    memory = mmap.mmap(shared, 3 * PAGE)
    library = os.open("library", os.O_RDONLY)
    text = mmap.mmap(library, 2 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(library)
    os.unlink("shared")
    # As an upgrade does: another file takes its place.
    with open("library.new", "wb") as file:
        file.write(b"N" * 2 * PAGE)
    os.rename("library.new", "library")
    temporary = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(temporary, b"temporary")
    log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(log, b"one ")
    os.unlink("log")
    reader = os.open(f"/proc/self/fd/{log}", os.O_RDONLY)
    pause()
    memory[PAGE] = ord("m")
    os.pwrite(shared, b"w", 2 * PAGE)
    os.write(log, b"two ")
    pause()
    os.write(log, b"three ")
    os.ftruncate(shared, 4 * PAGE)
    last()
    same("a store", os.pread(shared, 1, PAGE), b"m")
    same("a write", memory[2 * PAGE], ord("w"))
    same("the rest", memory[0:PAGE], b"s" * PAGE)
    same("size", os.fstat(shared).st_size, 4 * PAGE)
    same("mode", os.fstat(shared).st_mode & 0o7777, 0o604)
    same("links", os.fstat(shared).st_nlink, 0)
    where = os.path.join(os.getcwd(), "shared (deleted)")
    same("name", os.readlink(f"/proc/self/fd/{shared}"), where)
    same("the old library", text[:], b"l" * 2 * PAGE)
    with open("library", "rb") as file:
        same("the new library", file.read(1), b"N")
    same("a nameless file", os.pread(temporary, 100, 0), b"temporary")
    os.write(log, b"four")
    same("a log", os.read(reader, 100), b"one two three four")


def posix_shm():
    base = "/dev/shm/"
    same("empty at first", os.listdir(base), [])
    def make(name, text):
        fd = os.open(base + name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
        os.write(fd, text)
        os.ftruncate(fd, 4 * PAGE)
        return fd, mmap.mmap(fd, 4 * PAGE)
    one, one_memory = make("one", b"one")
    os.close(one)
    two, two_memory = make("two", b"two")
    three, three_memory = make("three", b"three")
    os.mkdir(base + "directory", 0o750)
    with open(base + "directory/unopened", "w") as file:
        file.write("nobody has it open")
    os.symlink("one", base + "link")
    os.mkfifo(base + "fifo", 0o600)
    child = Child(at(one_memory))
    pause()
    child.ask("set", PAGE, 1)
    os.rename(base + "two", base + "renamed")
    os.link(base + "three", base + "hard")
    os.unlink(base + "three")
    fresh, fresh_memory = make("two", b"another two")
    os.chmod(base + "renamed", 0o600)
    pause()
    os.unlink(base + "one")
    with open(base + "directory/unopened", "a") as file:
        file.write(", still")
    os.unlink(base + "fifo")
    child.ask("set", 2 * PAGE, 2)
    last()
    names = sorted(os.listdir(base))
    same("names", names, ["directory", "hard", "link", "renamed", "two"])
    same("memory without name", one_memory[0:3], b"one")
    same("a child's stores", (one_memory[PAGE], one_memory[2 * PAGE]), (1, 2))
    child.ask("set", 0, 9)
    same("shared still", one_memory[0], 9)
    two_memory[1] = ord("W")
    with open(base + "renamed", "rb") as file:
        same("a renamed file", file.read(3), b"tWo")
    same("its mode", os.stat(base + "renamed").st_mode & 0o7777, 0o600)
    three_memory[0:1] = b"T"
    with open(base + "hard", "rb") as file:
        same("a linked file", file.read(5), b"Three")
    same("its other name's mode", os.fstat(three).st_mode & 0o7777, 0o640)
    same("a file in place of another", os.pread(fresh, 11, 0), b"another two")
    with open(base + "directory/unopened") as file:
        same("an unopened file", file.read(), "nobody has it open, still")
    same("directory mode", os.stat(base + "directory").st_mode & 0o7777, 0o750)
    same("a link", os.readlink(base + "link"), "one")


def work(lock, queue, answers, value, name):
    from multiprocessing import shared_memory

    memory = shared_memory.SharedMemory(name)
    for job in iter(queue.get, None):
        with lock:
            value.value += job
        memory.buf[job] = job
        answers.put(job * job)


def multiprocessing():
    import multiprocessing as mp
    from multiprocessing import shared_memory

    context = mp.get_context("fork")
    lock, queue, answers = context.Lock(), context.Queue(), context.Queue()
    value = context.Value("l", 0)
    memory = shared_memory.SharedMemory(create=True, size=1000)
    held = context.Semaphore(2)
    held.acquire()
    workers = [
        context.Process(target=work, args=(lock, queue, answers, value, memory.name))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    def run(jobs):
        for job in jobs:
            queue.put(job)
        same("answers", sorted(answers.get() for _ in jobs), [j * j for j in jobs])
    run(range(1, 10))
    pause()
    run(range(10, 50))
    pause()
    run(range(50, 60))
    last()
    same("a value", value.value, sum(range(60)))
    same("shared memory", list(memory.buf[:60]), list(range(60)))
    run(range(60, 100))
    same("a value later", value.value, sum(range(100)))
    same("a semaphore", (held.acquire(False), held.acquire(False)), (True, False))
    for _ in workers:
        queue.put(None)
    for worker in workers:
        worker.join()
    same("ends", [w.exitcode for w in workers], [0, 0, 0])
    memory.close()
    memory.unlink()


IPC_CREAT, IPC_RMID, IPC_SET, IPC_STAT = 0o1000, 0, 1, 2
GETVAL, SETVAL = 12, 16


def sysvipc(kind):
    """The lines of a list, by id: key, perms and the fields behind them."""
    with open(f"/proc/sysvipc/{kind}") as file:
        lines = [line.split() for line in file][1:]
    return {int(f[1]): [int(f[0]), f[2]] + [int(n) for n in f[3:]] for f in lines}


def segment(address, size):
    return (ctypes.c_char * size).from_address(address)


def system_v_memory():
    burnt = call("shmget", 0, PAGE, 0o600)
    call("shmctl", burnt, IPC_RMID, None)
    one = call("shmget", 0x1234, 3 * PAGE - 100, IPC_CREAT | 0o640)
    unattached = call("shmget", 0x1235, PAGE, IPC_CREAT | 0o600)
    deleted = call("shmget", 0, 2 * PAGE, 0o600)
    here = call("shmat", one, None, 0)
    again = call("shmat", one, None, 0o10000)
    lost = call("shmat", deleted, None, 0)
    brief = call("shmat", unattached, None, 0)
    segment(brief, PAGE)[0:4] = b"left"
    call("shmdt", ctypes.c_void_p(brief))
    child = Child(at(memoryview(segment(here, 3 * PAGE)).cast("B")))
    call("shmctl", deleted, IPC_RMID, None)
    segment(here, 100)[0:5] = b"first"
    segment(lost, 100)[0:4] = b"lost"
    pause()
    child.ask("set", PAGE, 1)
    late = call("shmget", 0x1236, 100, IPC_CREAT | 0o666)
    brief = call("shmat", late, None, 0)
    segment(brief, 100)[0:4] = b"late"
    call("shmdt", ctypes.c_void_p(brief))
    gone = call("shmget", 0x1237, 100, IPC_CREAT | 0o600)
    pause()
    call("shmctl", gone, IPC_RMID, None)
    segment(lost, 100)[4:8] = b", no"
    brief = call("shmat", unattached, None, 0)
    segment(brief, PAGE)[4:8] = b" too"
    call("shmdt", ctypes.c_void_p(brief))
    last()
    listed = sysvipc("shm")
    same("ids", sorted(listed), sorted([one, unattached, deleted, late]))
    fields = {i: (f[0], f[1], f[2], f[5]) for i, f in listed.items()}
    same("one", fields[one], (0x1234, "640", 3 * PAGE - 100, 4))
    same("unattached", fields[unattached], (0x1235, "600", PAGE, 0))
    same("deleted", fields[deleted], (0, "1600", 2 * PAGE, 2))
    same("late", fields[late], (0x1236, "666", 100, 0))
    same("contents", segment(here, 100)[0:5], b"first")
    same("seen twice", segment(again, 2 * PAGE)[PAGE : PAGE + 1], b"\x01")
    same("rights", map_line(again)[1], "r--s")
    same("of the deleted", segment(lost, 100)[0:8], b"lost, no")
    brief = call("shmat", unattached, None, 0)
    same("unattached contents", segment(brief, PAGE)[0:8], b"left too")
    brief = call("shmat", call("shmget", 0x1236, 0, 0), None, 0)
    same("late contents", segment(brief, 100)[0:4], b"late")
    child.ask("set", 0, ord("F"))
    same("shared still", segment(here, 100)[0:1], b"F")
    call("shmdt", ctypes.c_void_p(here))
    same("attached counts", sysvipc("shm")[one][5], 3)


class Message(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_long), ("text", ctypes.c_char * 5000)]


def system_v_messages():
    burnt = call("msgget", 0, 0o600)
    call("msgctl", burnt, IPC_RMID, None)
    queue = call("msgget", 0x4321, IPC_CREAT | 0o640)
    empty = call("msgget", 0, 0o600)
    def put(kind, text):
        call("msgsnd", queue, ctypes.byref(Message(kind, text)), len(text), 0)
    def get(kind):
        message = Message()
        size = call("msgrcv", queue, ctypes.byref(message), 5000, ctypes.c_long(kind), 0)
        return message.kind, message.text[:size]
    put(1, b"one")
    put(7, b"x" * 4000)
    put(2, b"")
    pause()
    same("the first", get(0), (1, b"one"))
    put(1, b"another")
    last()
    listed = sysvipc("msg")
    same("ids", sorted(listed), sorted([queue, empty]))
    same("key, rights, bytes, number", listed[queue][:4], [0x4321, "640", 4007, 3])
    same("by type", get(1), (1, b"another"))
    same("in order", get(0), (7, b"x" * 4000))
    same("the empty one", get(0), (2, b""))
    put(3, b"new")
    same("a new one", get(3), (3, b"new"))


class Operation(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("by", ctypes.c_short), ("flags", ctypes.c_short)]


def system_v_semaphores():
    burnt = call("semget", 0, 1, 0o600)
    call("semctl", burnt, 0, IPC_RMID)
    one = call("semget", 0x5555, 3, IPC_CREAT | 0o660)
    other = call("semget", 0, 250, 0o600)
    call("semctl", one, 1, SETVAL, 5)
    call("semctl", other, 249, SETVAL, 32767)
    def wait(*_):
        call("semop", one, ctypes.byref(Operation(0, -1, 0)), 1)
        return call("semctl", one, 0, GETVAL)
    child = Child(wait)
    pause()
    call("semop", one, ctypes.byref(Operation(1, -2, 0)), 1)
    print("wait", file=child.orders, flush=True)
    late = call("semget", 0x5556, 1, IPC_CREAT | 0o600)
    last()
    listed = sysvipc("sem")
    same("ids", sorted(listed), sorted([one, other, late]))
    same("key, rights, number", listed[one][:3], [0x5555, "660", 3])
    values = [call("semctl", one, i, GETVAL) for i in range(3)]
    same("values", values, [0, 3, 0])
    same("the last of many", call("semctl", other, 249, GETVAL), 32767)
    call("semop", one, ctypes.byref(Operation(0, 1, 0)), 1)
    same("one who waited goes on", child.answers.readline().strip(), "0")


def smaps_flags(address):
    flags = None
    with open("/proc/self/smaps") as smaps:
        here = False
        for line in smaps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                start, end = (int(n, 16) for n in head.split("-"))
                here = start <= address < end
            elif here and head == "VmFlags:":
                flags = set(line.split()[1:])
    return flags


def advice():
    names = {
        10: "dc", 12: "mg", 14: "hg", 15: "nh", 16: "dd", 18: "wf", 2: "sr", 1: "rr",
        "mlock": "lo", "mlock2": "lf", "mseal": "sl",
    }
    places = {}
    def place(what):
        memory = mmap.mmap(-1, 8 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[0:4] = b"here"
        base = address_of(memory)
        # A mapping without flags on either side.
        for end in (base, base + 7 * PAGE):
            call("mprotect", ctypes.c_void_p(end), PAGE, mmap.PROT_READ)
        middle, size = ctypes.c_void_p(base + PAGE), ctypes.c_size_t(6 * PAGE)
        memory[PAGE : PAGE + 4] = b"this"
        if what == "mlock":
            call("mlock", middle, size)
        elif what == "mlock2":
            call("mlock2", middle, size, 1)
        elif what == "mseal":
            if libc.syscall(462, middle, size, 0) != 0:
                return
        elif libc.madvise(middle, size, what) != 0:
            return
        places[what] = (memory, base + PAGE)
    early = (10, 14, 16, 1, "mlock", "mseal")
    for what in early:
        place(what)
    changed = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    call("madvise", ctypes.c_void_p(address_of(changed)), 4 * PAGE, 10)
    pause()
    for what in names:
        if what not in early:
            place(what)
    call("madvise", ctypes.c_void_p(address_of(changed)), 4 * PAGE, 11)
    time.sleep(0.3)
    pause()
    last()
    same("kinds", len(places) >= 9, True)
    for what, (memory, at) in places.items():
        same(f"flag of {what}", names[what] in smaps_flags(at), True)
        others = set(names.values()) - {names[what], "lo"}
        same(f"other flags with {what}", smaps_flags(at) & others, set())
        same(f"contents of {what}", memory[PAGE : PAGE + 4], b"this")
        same(f"beside {what}", smaps_flags(at - PAGE) & set(names.values()), set())
    same("a flag taken back", "dc" in smaps_flags(address_of(changed)), False)
    same("locked", libc.madvise(ctypes.c_void_p(places["mlock"][1]), PAGE, 4), -1)
    if "mseal" in places:
        same("sealed", libc.munmap(ctypes.c_void_p(places["mseal"][1]), PAGE), -1)
    down, up = os.pipe()
    pid = os.fork()
    if pid == 0:
        forgot = map_line(places[10][1]) is None
        wiped = places[18][0][PAGE : PAGE + 4] == bytes(4)
        os.write(up, b"yes" if forgot and wiped else b"no")
        os._exit(0)
    same("what a child gets", os.read(down, 3), b"yes")


def guard_regions():
    install, remove = 102, 103
    read_end, write_end = os.pipe()

    def memory(pages):
        it = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(pages):
            it[page * PAGE : page * PAGE + 8] = b"page%4d" % page
        return it

    def guard(it, first, count, advice=install):
        at = ctypes.c_void_p(address_of(it) + first * PAGE)
        call("madvise", at, ctypes.c_size_t(count * PAGE), advice)

    def guards(it):
        """The pages that the kernel cannot read for us either."""
        base = address_of(it)
        found = []
        for page in range(len(it) // PAGE):
            if libc.write(write_end, ctypes.c_void_p(base + page * PAGE), 1) == 1:
                os.read(read_end, 1)
            else:
                same("why", ctypes.get_errno(), 14)
                found.append(page)
        return found

    probe = memory(1)
    if libc.madvise(ctypes.c_void_p(address_of(probe)), PAGE, install) != 0:
        print("skipped: this kernel has no guard regions", flush=True)
        pause()
        last()
        return
    stay, change, many, locked = memory(16), memory(16), memory(3000), memory(8)
    guard(stay, 4, 4)
    guard(change, 2, 6)
    for page in range(0, 3000, 2):
        guard(many, page, 1)
    hidden = memory(8)
    guard(hidden, 3, 2)
    call("mprotect", ctypes.c_void_p(address_of(hidden)), 8 * PAGE, 0)
    # Where another mapping is later.
    place = call("mmap", None, 8 * PAGE, 3, 0x22, -1, 0)
    call("madvise", ctypes.c_void_p(place), ctypes.c_size_t(8 * PAGE), install)
    guard(locked, 1, 2)
    libc.mlock2(ctypes.c_void_p(address_of(locked)), 8 * PAGE, 1)
    # A child has the guards of its parent.
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(down[0], 1)
        mine = memory(4)
        guard(mine, 1, 1)
        os.read(down[0], 1)
        good = guards(stay) == [4, 5, 6, 7] and guards(mine) == [1]
        os.write(up[1], b"y" if good else b"n")
        os._exit(0)
    pause()
    guard(change, 3, 3, remove)
    change[4 * PAGE : 4 * PAGE + 3] = b"new"
    guard(change, 10, 2)
    call("munmap", ctypes.c_void_p(place), 8 * PAGE)
    call("mmap", ctypes.c_void_p(place), 8 * PAGE, 3, 0x32, -1, 0)
    ctypes.memset(place, 7, 8 * PAGE)
    os.write(down[1], b"x")
    pause()
    last()
    same("a region that stays", guards(stay), [4, 5, 6, 7])
    same("one that changes", guards(change), [2, 6, 7, 10, 11])
    same("many", guards(many), list(range(0, 3000, 2)))
    same("in locked memory", guards(locked), [1, 2])
    same("locked", "lf" in smaps_flags(address_of(locked)), True)
    call("mprotect", ctypes.c_void_p(address_of(hidden)), 8 * PAGE, 3)
    same("behind a protection", guards(hidden), [3, 4])
    same("none in a new mapping", ctypes.string_at(place, 8 * PAGE), bytes([7]) * 8 * PAGE)
    for page in range(1, 3000, 2):
        same("between guards", many[page * PAGE : page * PAGE + 8], b"page%4d" % page)
    text = lambda page: change[page * PAGE : page * PAGE + 8]
    same("taken away", [text(3), text(4), text(5)], [bytes(8), b"new" + bytes(5), bytes(8)])
    guard(change, 10, 2, remove)
    same("what a guard took", [text(9), text(10), text(12)], [b"page   9", bytes(8), b"page  12"])
    os.write(down[1], b"x")
    same("those of a child", os.read(up[0], 1), b"y")


def host_names():
    import socket

    same("at first", socket.gethostname(), "inside")
    socket.sethostname("renamed-once")
    pause()
    socket.sethostname("renamed-twice")
    call("setdomainname", b"a.domain", 8)
    last()
    same("host name", socket.gethostname(), "renamed-twice")
    with open("/proc/sys/kernel/domainname") as file:
        same("domain name", file.read().strip(), "a.domain")


KINDS = {
    f.__name__: f
    for f in (
        shared_anonymous,
        shared_anonymous_moves,
        memfd,
        deleted_files,
        mapped_files,
        posix_shm,
        multiprocessing,
        system_v_memory,
        system_v_messages,
        system_v_semaphores,
        advice,
        guard_regions,
        host_names,
    )
}

if __name__ == "__main__":
    signal.alarm(0)
    KINDS[sys.argv[1]]()
    print("kind", sys.argv[1], "ok", flush=True)
    while True:
        time.sleep(1)
