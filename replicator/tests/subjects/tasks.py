"""What processes and threads can have besides memory and descriptors, each kind in a process of
its own that notices if any of it is wrong after a restore.

A kind is a generator: it sets up what it has, yields, and looks again. The first process starts
the kinds of a group (its argument) and prints "ready" when they are set up; each prints "kind NAME ok" in the end.
"""

import asyncio
import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from select import EPOLLIN, epoll as Epoll

libc = ctypes.CDLL(None, use_errno=True)
KINDS = {}
GROUPS = {}


def group(name):
    """The kinds that follow share a container."""
    GROUPS[name] = []


def kind(function):
    KINDS[function.__name__] = function
    GROUPS[list(GROUPS)[-1]].append(function.__name__)
    return function


def syscall(number, *args):
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def prctl(option, *args):
    return syscall(157, option, *args, *[0] * (4 - len(args)))


def say(text):
    os.write(1, (text + "\n").encode())


def wait_for(holds, what):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.005)


def equal(now, before, what=""):
    assert now == before, f"{what}: {now!r} is not {before!r}"


def near(now, wanted, slack, what):
    assert wanted - slack <= now <= wanted + slack, f"{what}: {now} is not near {wanted}"


# Time

group("timers")


@kind
def interval_timer_real():
    signal.signal(signal.SIGALRM, lambda *_: None)
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1000, 7.25)
    yield
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    near(left, 1000 - (time.monotonic() - begin), 0.5, "left")
    equal(interval, 7.25, "interval")


@kind
def interval_timer_that_goes_off():
    times = []
    signal.signal(signal.SIGALRM, lambda *_: times.append(time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    wait_for(lambda: len(times) > 3, "it goes off")
    yield
    before = len(times)
    wait_for(lambda: len(times) > before + 3, "it goes off again")


@kind
def interval_timers_of_processor_time():
    signal.setitimer(signal.ITIMER_VIRTUAL, 500, 0)
    signal.setitimer(signal.ITIMER_PROF, 600, 3)
    yield
    near(signal.getitimer(signal.ITIMER_VIRTUAL)[0], 500, 5, "virtual")
    left, interval = signal.getitimer(signal.ITIMER_PROF)
    near(left, 600, 5, "prof")
    equal(interval, 3)


@kind
def alarm_that_is_blocked_goes_on_when_its_signal_is_taken():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    wait_for(lambda: signal.SIGALRM in signal.sigpending(), "it is pending")
    yield
    for _ in range(3):
        equal(signal.sigwait([signal.SIGALRM]), signal.SIGALRM)


def timer_create(clock, sig, word, notify=0, tid=0):
    event = ctypes.create_string_buffer(struct.pack("qiii44x", word, sig, notify, tid), 64)
    ident = ctypes.c_int()
    syscall(222, clock, event, ctypes.byref(ident))
    return ident.value


def timer_settime(ident, value, interval, flags=0):
    parts = lambda t: (int(t), round(t % 1 * 1e9))
    time_ = ctypes.create_string_buffer(struct.pack("qqqq", *parts(interval), *parts(value)), 32)
    syscall(223, ident, flags, time_, 0)


def timer_gettime(ident):
    buffer = ctypes.create_string_buffer(32)
    syscall(224, ident, buffer)
    a, b, c, d = struct.unpack("qqqq", buffer.raw)
    return c + d / 1e9, a + b / 1e9


@kind
def posix_timers():
    monotonic, realtime, boottime, process = 1, 0, 7, 2
    begin = time.monotonic()
    first = timer_create(monotonic, signal.SIGUSR1, 0x1234)
    gone = timer_create(realtime, signal.SIGUSR1, 0)
    third = timer_create(realtime, signal.SIGRTMIN + 3, -1)
    syscall(226, gone)
    fourth = timer_create(boottime, 0, 5, notify=1)
    fifth = timer_create(process, signal.SIGUSR2, 0)
    idle = timer_create(monotonic, signal.SIGUSR2, 0)
    timer_settime(first, 900, 2.5)
    timer_settime(third, time.time() + 800, 0, flags=1)
    timer_settime(fourth, 700, 1)
    timer_settime(fifth, 600, 0)
    listed = open("/proc/self/timers").read()
    yield
    equal(open("/proc/self/timers").read(), listed, "their list")
    past = time.monotonic() - begin
    for ident, wanted, every in ((first, 900, 2.5), (third, 800, 0), (fourth, 700, 1)):
        left, interval = timer_gettime(ident)
        near(left, wanted - past, 0.5, f"timer {ident}")
        equal(interval, every)
    near(timer_gettime(fifth)[0], 600, 5, "of processor time")
    equal(timer_gettime(idle), (0, 0))


@kind
def posix_timer_that_tells_its_word():
    got = []
    number = signal.SIGRTMIN + 1
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    ident = timer_create(1, number, 77)
    timer_settime(ident, 0.01, 0.01)
    yield
    for _ in range(3):
        info = signal.sigtimedwait([number], 30)
        assert info is not None, "it does not go off"
        equal((info.si_signo, info.si_code), (number, -2))


@kind
def posix_timer_for_a_thread():
    number = signal.SIGRTMIN + 2
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    go, told = threading.Event(), []

    def wait():
        told.append(syscall(186))
        go.wait()
        told.append(signal.sigtimedwait([number], 30) is not None)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: told, "its number is known")
    ident = timer_create(1, number, 5, notify=4, tid=told[0])
    timer_settime(ident, 0.01, 0)
    yield
    go.set()
    thread.join()
    equal(told[1], True, "the thread was told")


# Waits: each begins before the first stop is over and lasts longer than the kill and the restore
# take. If it began anew at the restore, or at each stop, it would end much too late.

group("waits")

WAIT = 6


def timespec(seconds):
    return ctypes.create_string_buffer(struct.pack("qq", int(seconds), round(seconds % 1 * 1e9)), 16)


def waiting(begin):
    """Runs begin() in a thread: it makes one call, which must last WAIT seconds. Waits until it
    is over; gives the result of the call."""
    done = []

    def wait():
        start = time.monotonic()
        try:
            result = begin()
        except OSError as e:
            result = -e.errno
        done.append((result, time.monotonic() - start))

    thread = threading.Thread(target=wait)
    thread.start()
    # Restored while it waits, not before.
    yield
    restored = time.monotonic()
    thread.join()
    rest = time.monotonic() - restored
    result, lasted = done[0]
    assert WAIT - 0.002 <= lasted, f"it lasted {lasted} s instead of {WAIT}"
    # It may have begun to count at the first stop, some time before the restore; not there.
    assert rest < WAIT - 0.05, f"it lasted {lasted} s, {rest} s of them since the restore"
    return result


def waits(wanted):
    def decorate(begin):
        def run():
            result = yield from waiting(begin)
            equal(result, wanted, "the result")

        run.__name__ = "wait_of_" + begin.__name__
        kind(run)
        return begin

    return decorate


EAGAIN, ETIMEDOUT = 11, 110
READ_ONLY = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
READ_ONLY[:16] = struct.pack("qq", WAIT, 0)
at = ctypes.addressof(ctypes.c_char.from_buffer(READ_ONLY))
syscall(10, at, 4096, 1)


@waits(0)
def nanosleep():
    return syscall(35, timespec(WAIT), 0)


@waits(0)
def nanosleep_with_rest():
    rest = timespec(WAIT)
    return syscall(35, rest, rest)


@waits(0)
def clock_nanosleep():
    return syscall(230, 7, 0, timespec(WAIT), 0)


@waits(0)
def clock_nanosleep_until():
    return syscall(230, 1, 1, timespec(time.monotonic() + WAIT), 0)


@waits(-ETIMEDOUT)
def futex():
    return syscall(202, ctypes.create_string_buffer(4), 128, 0, timespec(WAIT), 0, 0)


@waits(-ETIMEDOUT)
def futex_until():
    until = timespec(time.monotonic() + WAIT)
    return syscall(202, ctypes.create_string_buffer(4), 128 | 9, 0, until, 0, 0xFFFFFFFF)


@waits(0)
def poll():
    return syscall(7, 0, 0, WAIT * 1000)


@waits(0)
def ppoll():
    return syscall(271, 0, 0, timespec(WAIT), 0, 0)


@waits(0)
def ppoll_of_read_only_time():
    return syscall(271, 0, 0, at, 0, 0)


@waits(0)
def select():
    return syscall(23, 0, 0, 0, 0, timespec(WAIT))


@waits(0)
def pselect6():
    return syscall(270, 0, 0, 0, 0, timespec(WAIT), 0)


def an_epoll():
    return syscall(291, 0), ctypes.create_string_buffer(12)


@waits(0)
def epoll_wait():
    epoll, event = an_epoll()
    return syscall(232, epoll, event, 1, WAIT * 1000)


@waits(0)
def epoll_pwait():
    epoll, event = an_epoll()
    mask = ctypes.create_string_buffer(8)
    return syscall(281, epoll, event, 1, WAIT * 1000, mask, 8)


@waits(0)
def epoll_pwait2():
    epoll, event = an_epoll()
    return syscall(441, epoll, event, 1, timespec(WAIT), 0, 0)


def signal_set(number):
    return ctypes.create_string_buffer(struct.pack("Q", 1 << (number - 1)), 8)


@waits(-EAGAIN)
def rt_sigtimedwait():
    return syscall(128, signal_set(signal.SIGUSR1), 0, timespec(WAIT), 8)


@waits(-EAGAIN)
def semtimedop():
    semaphores = syscall(64, 0, 1, 0o600)
    try:
        return syscall(220, semaphores, struct.pack("Hhh", 0, -1, 0), 1, timespec(WAIT))
    finally:
        syscall(66, semaphores, 0, 0)


@kind
def wait_for_a_signal_without_end():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    got = []
    # sigwaitinfo(2), which may not see an EINTR.
    wait = lambda: got.append(syscall(128, signal_set(signal.SIGUSR1), 0, 0, 8))
    thread = threading.Thread(target=wait)
    thread.start()
    yield
    equal(got, [])
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    thread.join()
    equal(got, [signal.SIGUSR1])


@kind
def wait_of_read_and_of_a_lock_without_end():
    ends = os.pipe()
    lock = threading.Lock()
    lock.acquire()
    got = []
    threads = [threading.Thread(target=lambda: got.append(os.read(ends[0], 10)))]
    threads.append(threading.Thread(target=lambda: got.append(lock.acquire())))
    for thread in threads:
        thread.start()
    yield
    equal(got, [])
    os.write(ends[1], b"now")
    threads[0].join()
    lock.release()
    threads[1].join()
    equal(got, [b"now", True])


# The tree

group("tree")


def fork(child):
    """A child that runs a function and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            say(f"FAILED in a child\n{traceback.format_exc()}")
            os._exit(1)
        os._exit(0)
    return pid


def told(pipe):
    """What a child writes into a pipe: one line."""
    return os.read(pipe, 1000).decode()


def forever():
    while True:
        time.sleep(0.05)


class Probe:
    """A descendant that tells its numbers when it is asked."""

    def __init__(self, make=lambda run: fork(run)):
        self.ask, self.answer = os.pipe(), os.pipe()
        self.pid = make(self.run)

    def run(self):
        while True:
            os.read(self.ask[0], 1)
            os.write(self.answer[1], self.tell())

    def tell(self):
        numbers = (os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))
        return " ".join(map(str, numbers)).encode()

    def __call__(self):
        os.write(self.ask[1], b"?")
        return [int(n) for n in told(self.answer[0]).split()]


def orphan(before=lambda: None, between=lambda: None):
    """For Probe: its maker has ended and was waited for."""

    def make(run):
        def maker():
            before()
            fork(lambda: (between(), run()))

        os.waitpid(fork(maker), 0)

    return make


def settled(probe):
    """The numbers of an orphan, once its parent's end was noticed."""
    maker = probe()[1]
    if maker not in (1, os.getpid()):
        wait_for(lambda: probe()[1] != maker, "it is an orphan")
    return probe()


@kind
def orphans_are_children_of_the_first_process():
    probe = Probe(orphan())
    before = settled(probe)
    equal(before[1], 1, "its parent")
    yield
    equal(probe(), before)


@kind
def orphans_are_children_of_a_subreaper():
    prctl(36, 1)
    probe = Probe(orphan())
    before = settled(probe)
    equal(before[1], os.getpid(), "its parent")
    yield
    equal(probe(), before)
    equal(settled(Probe(orphan()))[1], os.getpid(), "a later one's parent")


@kind
def session_whose_leader_has_ended():
    probe = Probe(orphan(before=os.setsid))
    before = settled(probe)
    assert before[3] != before[0] and before[3] == before[2]
    yield
    equal(probe(), before)


@kind
def sessions_and_groups_with_living_leaders():
    leader = Probe(lambda run: fork(lambda: (os.setsid(), run())))
    grouped = Probe(lambda run: fork(lambda: (os.setpgid(0, 0), run())))
    wait_for(lambda: grouped()[2] == grouped.pid, "it leads")
    joined = Probe(lambda run: fork(lambda: (os.setpgid(0, grouped.pid), run())))
    before = [probe() for probe in (leader, grouped, joined)]
    yield
    equal([probe() for probe in (leader, grouped, joined)], before)


@kind
def orphan_in_the_session_of_its_grandparent():
    inner = []

    def make(run):
        probe = Probe(orphan())
        inner.append(probe)
        settled(probe)
        while True:
            os.read(outer_ask[0], 1)
            os.write(outer_answer[1], " ".join(map(str, [os.getpid(), *probe()])).encode())

    outer_ask, outer_answer = os.pipe(), os.pipe()
    fork(lambda: (os.setsid(), make(None)))

    def ask():
        os.write(outer_ask[1], b"?")
        return told(outer_answer[0]).split()

    before = ask()
    equal((before[0], before[2]), (before[4], "1"), "its session and parent")
    yield
    equal(ask(), before)


@kind
def group_whose_leader_has_ended():
    leader = fork(lambda: (os.setpgid(0, 0), forever()))
    wait_for(lambda: os.getpgid(leader) == leader, "it leads")
    probe = Probe(lambda run: fork(lambda: (os.setpgid(0, leader), run())))
    probe()
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    before = probe()
    equal(before[2], leader)
    yield
    equal(probe(), before)
    os.killpg(leader, signal.SIGKILL)
    equal(os.waitpid(probe.pid, 0)[1], signal.SIGKILL)


@kind
def ended_children_wait_for_their_parent():
    def as_nobody():
        os.setuid(65534)
        os._exit(9)

    exited, other = fork(lambda: os._exit(7)), fork(as_nobody)
    killed = fork(forever)
    os.kill(killed, signal.SIGTERM)
    waited = fork(lambda: os._exit(0))
    os.waitpid(waited, 0)
    for pid in (exited, other, killed):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield
    equal(os.waitpid(exited, os.WNOHANG), (exited, 7 << 8))
    info = os.waitid(os.P_PID, other, os.WEXITED)
    equal((info.si_pid, info.si_uid, info.si_status), (other, 65534, 9))
    equal(os.waitpid(killed, os.WNOHANG), (killed, signal.SIGTERM))
    try:
        os.waitpid(-1, os.WNOHANG)
        assert False, "it has more children"
    except ChildProcessError:
        pass


@kind
def ended_leader_of_a_session_with_members():
    inner = Probe(lambda run: None)
    leader = fork(lambda: (os.setsid(), fork(inner.run), os._exit(3)))
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    before = settled(inner)
    equal(before[1:], [1, leader, leader])
    yield
    equal(inner(), before)
    equal(os.waitpid(leader, 0), (leader, 3 << 8))


@kind
def ended_child_is_told_once():
    told = []
    signal.signal(signal.SIGCHLD, lambda *_: told.append(1))
    pid = fork(lambda: os._exit(0))
    wait_for(lambda: told, "it is told")
    yield
    time.sleep(0.05)
    equal(told, [1])
    os.waitpid(pid, 0)


@kind
def exit_signal_of_a_child():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    pid = syscall(56, int(signal.SIGUSR1), 0, 0, 0, 0)
    if pid == 0:
        while True:
            time.sleep(1)
    yield
    os.kill(pid, signal.SIGKILL)
    info = signal.sigtimedwait([signal.SIGUSR1], 30)
    equal(info.si_pid, pid)
    equal(os.waitpid(pid, 0x40000000)[0], pid)


@kind
def parent_death_signal():
    prctl(1, int(signal.SIGUSR2))
    yield
    got = ctypes.c_int()
    prctl(2, ctypes.byref(got))
    equal(got.value, signal.SIGUSR2)


def state_of(pid):
    return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]


@kind
def stopped_by_job_control():
    counter = os.pipe()
    os.set_blocking(counter[0], False)

    def ran():
        try:
            return os.read(counter[0], 65536)
        except BlockingIOError:
            return b""

    pid = fork(lambda: [os.write(counter[1], b".") and time.sleep(0.001) for _ in iter(int, 1)])
    wait_for(lambda: ran(), "it runs")
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    ran()
    yield
    wait_for(lambda: state_of(pid) in "Tt", "it stands still")
    ran()
    time.sleep(0.1)
    equal(ran(), b"", "what it did while stopped")
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: ran(), "it goes on")


@kind
def children_and_threads_that_come_and_go():
    rounds = [0]

    def churn():
        while True:
            pid = fork(lambda: os._exit(rounds[0] % 100))
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            equal(os.waitpid(pid, 0)[1], (rounds[0] % 100) << 8)
            rounds[0] += 1

    threading.Thread(target=churn, daemon=True).start()
    wait_for(lambda: rounds[0] > 10, "they come and go")
    yield
    before = rounds[0]
    wait_for(lambda: rounds[0] > before + 10, "they come and go again")


@kind
def names_of_threads():
    ids, end = [], threading.Event()
    threads = [threading.Thread(target=lambda: (ids.append(syscall(186)), end.wait())) for _ in "ab"]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(ids) == 2, "they run")
    names = lambda: [open(f"/proc/self/task/{i}/comm").read() for i in [os.getpid(), *ids]]
    prctl(15, ctypes.c_char_p(b"first name"))
    time.sleep(0.3)
    for i, ident in enumerate(ids):
        with open(f"/proc/self/task/{ident}/comm", "w") as file:
            file.write(f"later {i}")
    before = names()
    yield
    equal(names(), before)
    end.set()


@kind
def robust_mutex_of_a_thread_that_ends():
    mutex, kind_of = ctypes.create_string_buffer(64), ctypes.create_string_buffer(16)
    libc.pthread_mutexattr_init(kind_of)
    libc.pthread_mutexattr_setrobust(kind_of, 1)
    libc.pthread_mutex_init(mutex, kind_of)
    locked, end = threading.Event(), threading.Event()

    def owner():
        equal(libc.pthread_mutex_lock(mutex), 0)
        locked.set()
        end.wait()

    thread = threading.Thread(target=owner)
    thread.start()
    locked.wait()
    yield
    end.set()
    # Without its list the kernel would not find the mutex, and this would wait for ever.
    equal(libc.pthread_mutex_lock(mutex), 130, "EOWNERDEAD")
    thread.join()


@kind
def thread_whose_end_is_waited_for_by_its_number():
    # pthread_join(3) waits until the kernel clears the number (set_tid_address).
    end, told = threading.Event(), []
    routine = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: end.wait() and None)
    ident = ctypes.c_ulong()
    equal(libc.pthread_create(ctypes.byref(ident), None, routine, None), 0)
    yield
    joiner = threading.Thread(target=lambda: told.append(libc.pthread_join(ident, None)))
    joiner.start()
    time.sleep(0.05)
    equal(told, [], "it runs still")
    end.set()
    joiner.join()
    equal(told, [0])


@kind
def restartable_sequence_is_left_when_its_thread_is_stopped():
    try:
        if ctypes.c_uint.in_dll(libc, "__rseq_size").value == 0:
            raise ValueError
        offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
    except ValueError:
        # This C library registers none.
        yield
        return
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    base = ctypes.addressof(ctypes.c_char.from_buffer(code))
    # A sequence that spins until it is told to end, and begins anew whenever it is aborted:
    # rdi points to whether to end, how often it was aborted, the area, the description.
    begin = bytes.fromhex("488b4710 488b4f18 48894808")
    spin = bytes.fromhex("f390 48833f00 74f8")
    leave = bytes.fromhex("48c7400800000000 c3")
    aborted = len(begin + spin + leave) + 4
    abort = bytes.fromhex("48ff4708 48833f00 0f84") + struct.pack("<i", -(aborted + 14)) + b"\xc3"
    code[: aborted + len(abort)] = begin + spin + leave + struct.pack("<I", 0x53053053) + abort
    # struct rseq_cs: version and flags, start, length, where to go when aborted.
    start = base + len(begin)
    code[2048:2080] = struct.pack("<QQQQ", 0, start, len(spin), base + aborted)
    words = (ctypes.c_ulong * 4)()
    libc.pthread_self.restype = ctypes.c_ulong

    def run():
        words[2] = libc.pthread_self() + offset
        words[3] = base + 2048
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(base)(ctypes.addressof(words))

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: words[1] > 0, "it is aborted by the first stop, or by another thread")
    yield
    before = words[1]
    wait_for(lambda: words[1] > before, "it is aborted here as well")
    words[0] = 1
    thread.join()


# Settings

group("settings")


def status(*names, of="self"):
    lines = open(f"/proc/{of}/status").read().splitlines()
    return [line for line in lines if line.split(":")[0] in names]


def keeps(name, set_up, look):
    """A kind that is set up and looks the same afterwards."""

    def run():
        set_up()
        before = look()
        yield
        equal(look(), before)

    run.__name__ = name
    kind(run)


def priority():
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


def schedule(policy, level):
    return lambda: os.sched_setscheduler(0, policy, os.sched_param(level))


keeps("nice_value", lambda: os.nice(7), lambda: os.nice(0))
keeps("class_batch", schedule(os.SCHED_BATCH, 0), priority)
keeps("class_idle", schedule(os.SCHED_IDLE, 0), priority)
keeps("class_round_robin", schedule(os.SCHED_RR | os.SCHED_RESET_ON_FORK, 3), priority)
keeps("affinity", lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
      lambda: os.sched_getaffinity(0))
keeps("io_priority", lambda: syscall(251, 1, 0, 3 << 13), lambda: syscall(252, 1, 0))
keeps("timer_slack", lambda: prctl(29, 12345), lambda: prctl(30))
keeps("oom_score", lambda: open("/proc/self/oom_score_adj", "w").write("321"),
      lambda: open("/proc/self/oom_score_adj").read())
keeps("personality", lambda: syscall(135, 0x0040000), lambda: syscall(135, 0xFFFFFFFF))
keeps("no_huge_pages", lambda: prctl(41, 1), lambda: prctl(42))
keeps("membarrier", lambda: (syscall(324, 1 << 4, 0), syscall(324, 1 << 8, 0)),
      lambda: (syscall(324, 1 << 9, 0), syscall(324, 1 << 3, 0)))
keeps("file_mode_mask", lambda: os.umask(0o053), lambda: status("Umask"))
keeps("not_dumpable", lambda: prctl(4, 0), lambda: prctl(3))
keeps("limits", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99)),
      lambda: open("/proc/self/limits").read())
keeps("securebits", lambda: prctl(28, 0x1 | 0x2 | 0x20), lambda: prctl(27))
keeps("keep_capabilities", lambda: prctl(8, 1), lambda: (prctl(7), prctl(27)))
keeps("no_new_privileges", lambda: prctl(38, 1), lambda: prctl(39))



def seccomp(answers, flags=0):
    """Adds a filter that answers some calls in its way, and lets all others pass."""
    code = [(0x20, 0, 0, 0)]
    for number, answer in answers.items():
        code += [(0x15, 0, 1, number), (0x06, 0, 0, answer)]
    code += [(0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
    argument = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
    return syscall(317, 1, flags, ctypes.create_string_buffer(argument))


def errno_of(number, *args):
    try:
        return syscall(number, *args)
    except OSError as e:
        return -e.errno


ERRNO, KILL = 0x50000, 0x80000000


@kind
def seccomp_filters():
    # What a capture asks for (interval timers, alternate stacks) would be the end of it.
    seccomp({36: KILL, 131: KILL, 110: ERRNO | 77})
    yield
    equal(errno_of(110), -77, "getppid")
    equal(status("Seccomp", "Seccomp_filters")[1].split()[1], "1")
    pid = os.fork()
    if pid == 0:
        syscall(36, 0, ctypes.create_string_buffer(32))
        os._exit(0)
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGSYS, "what is forbidden")


@kind
def seccomp_filters_of_an_ordinary_user():
    prctl(38, 1)
    os.setresgid(301, 301, 301)
    os.setresuid(301, 301, 301)
    seccomp({110: ERRNO | 77}, flags=2)
    seccomp({110: ERRNO | 78, 157: ERRNO | 79, 13: KILL})
    yield
    # The newest of those that are equally strict wins.
    equal(errno_of(110), -78, "getppid")
    equal(errno_of(157, 39, 0, 0, 0, 0), -79, "prctl")
    equal(status("Seccomp_filters")[0].split()[1], "2")
    equal(status("NoNewPrivs")[0].split()[1], "1")


@kind
def seccomp_filters_of_threads():
    results, end, alone = [], threading.Event(), threading.Event()

    def other():
        alone.wait()
        end.wait()
        results.append((errno_of(110), errno_of(111)))

    thread = threading.Thread(target=other)
    thread.start()
    seccomp({110: ERRNO | 77}, flags=1)
    yield
    # What they have in common is one filter still, so that the next can be for both.
    equal(seccomp({111: ERRNO | 78}, flags=1), 0, "for all threads")
    alone.set()
    end.set()
    thread.join()
    equal(results, [(-77, -78)])


@kind
def seccomp_filters_of_one_thread():
    results, ready, end = [], threading.Event(), threading.Event()

    def other():
        seccomp({110: ERRNO | 77})
        ready.set()
        end.wait()
        results.append(errno_of(110))

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    yield
    end.set()
    thread.join()
    equal(results, [-77])
    equal(errno_of(110), os.getppid(), "another thread")


IDS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def become_another():
    os.setgroups([7, 9, 11])
    os.setresgid(101, 102, 103)
    os.setresuid(201, 202, 203)


def set_caps(effective, permitted, inheritable):
    sets = [s & 0xFFFFFFFF for s in (effective, permitted, inheritable)]
    sets += [s >> 32 for s in (effective, permitted, inheritable)]
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    syscall(126, header, ctypes.create_string_buffer(struct.pack("6I", *sets), 24))


def ambient():
    """An ordinary user with one capability for its children."""
    prctl(24, 5)
    prctl(8, 1)
    os.setresgid(301, 301, 301)
    os.setresuid(301, 301, 301)
    set_caps(1 << 10, 1 << 10 | 1 << 13, 1 << 10)
    prctl(47, 2, 10)


@kind
def settings_that_change_all_the_time():
    """Each is what it was set to last, at whatever point of the program it was stopped."""
    home, processors = os.getcwd(), sorted(os.sched_getaffinity(0))
    places = [f"{home}/place-{i}" for i in range(3)]
    for place in places:
        os.mkdir(place)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    ready, tells = os.pipe()

    def limit():
        return resource.getrlimit(resource.RLIMIT_CORE)[0]

    def change_and_look():
        n, mask = 0, 0
        os.umask(mask)
        place, groups, core, processor = home, os.getgroups(), limit(), processors
        while not stop:
            n += 1
            new = n % 512
            equal(os.umask(new), mask, "umask")
            mask = new
            equal(os.getcwd(), place, "working directory")
            place = places[n % 3]
            os.chdir(place)
            equal(sorted(os.getgroups()), sorted(groups), "groups")
            groups = [n % 1000 + 1, 7]
            os.setgroups(groups)
            equal(limit(), core, "a limit")
            core = n % 4096
            resource.setrlimit(resource.RLIMIT_CORE, (core, resource.RLIM_INFINITY))
            equal(sorted(os.sched_getaffinity(0)), processor, "affinity")
            processor = processors[n % len(processors):][:1]
            os.sched_setaffinity(0, processor)
            if n == 100:
                os.write(tells, b"x")

    pid = os.fork()
    if pid == 0:
        try:
            change_and_look()
            os._exit(3)
        except BaseException:
            say(f"kind settings_that_change_all_the_time FAILED\n{traceback.format_exc()}")
            os._exit(4)
    os.read(ready, 1)
    yield
    os.kill(pid, signal.SIGTERM)
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 3)


keeps("users_and_groups", become_another, lambda: status(*IDS))
keeps("capabilities", ambient, lambda: status(*IDS))


@kind
def users_of_threads_that_differ():
    ids, end = [], threading.Event()

    def other():
        syscall(119, 65533, 65533, 65533)
        syscall(117, 65534, 65534, 65534)
        ids.append(syscall(186))
        end.wait()

    threading.Thread(target=other).start()
    wait_for(lambda: ids, "it is another")
    look = lambda: [status(*IDS, of=f"self/task/{i}") for i in (os.getpid(), ids[0])]
    before = look()
    assert before[0] != before[1]
    yield
    equal(look(), before)
    end.set()


@kind
def root_directory():
    os.makedirs("jail/inner", exist_ok=True)
    os.chroot("jail")
    yield
    equal(os.listdir("/"), ["inner"])


# Signals

group("signals")


def action(number):
    buffer = ctypes.create_string_buffer(32)
    syscall(13, number, 0, buffer, 8)
    return buffer.raw


def queue(number, word, thread=None):
    info = ctypes.create_string_buffer(struct.pack("iii4xiiQ", number, 0, -1, 42, 43, word), 128)
    if thread:
        syscall(297, os.getpid(), thread, number, info)
    else:
        syscall(129, os.getpid(), number, info)


def take(number):
    buffer = ctypes.create_string_buffer(128)
    syscall(128, signal_set(number), buffer, timespec(0), 8)
    sig, _, code, pid, uid, word = struct.unpack("iii4xiiQ", buffer.raw[:32])
    return sig, code, pid, uid, word


@kind
def pending_signals_with_their_words():
    private, shared, plain = signal.SIGRTMIN + 5, signal.SIGRTMIN + 6, signal.SIGUSR1
    signal.pthread_sigmask(signal.SIG_BLOCK, [private, shared, plain, signal.SIGTERM])
    for word in (1, 2, 3):
        queue(private, word, thread=os.getpid())
        queue(shared, word + 10)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_kill(threading.get_ident(), plain)
    before = status("SigPnd", "ShdPnd", "SigBlk")
    yield
    equal(status("SigPnd", "ShdPnd", "SigBlk"), before)
    for word in (1, 2, 3):
        equal(take(private), (private, -1, 42, 43, word))
        equal(take(shared), (shared, -1, 42, 43, word + 10))
    equal(take(plain)[:3], (plain, -6, os.getpid()))
    equal(take(signal.SIGTERM)[:3], (signal.SIGTERM, 0, os.getpid()))


@kind
def signal_actions():
    # Handler, SA_RESTORER and others, restorer, mask.
    for number in (signal.SIGUSR1, signal.SIGRTMIN + 9, 64):
        raw = struct.pack("QQQQ", 0x1234000 + number, 0x04000000 | 0x50000004, 0x7777, 0x0F0F)
        syscall(13, int(number), ctypes.create_string_buffer(raw, 32), 0, 8)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    everything = lambda: [action(n) for n in range(1, 65)]
    before = everything()
    yield
    equal(everything(), before)


@kind
def alternate_stacks():
    memory = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def stack(*new):
        old = ctypes.create_string_buffer(24)
        new = ctypes.create_string_buffer(struct.pack("QiiQ", *new), 24) if new else 0
        syscall(131, new, old)
        return old.raw

    stacks, go, ids = {}, threading.Event(), []

    def other():
        stack(place + 32768, 0, 0, 20000)
        stacks["before"] = stack()
        ids.append(1)
        go.wait()
        stacks["after"] = stack()

    thread = threading.Thread(target=other)
    thread.start()
    # SS_AUTODISARM
    stack(place, -(1 << 31), 0, 16384)
    before = stack()
    wait_for(lambda: ids, "the other has its stack")
    yield
    equal(stack(), before)
    go.set()
    thread.join()
    equal(stacks["after"], stacks["before"])


# Waits on sockets, and real programs

group("programs")


@kind
def receiving_with_a_time_out_sees_no_interruption():
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 0, 400_000))
    results, end, buffer = [], [], ctypes.create_string_buffer(8)

    def receive():
        while not end:
            begin = time.monotonic()
            try:
                syscall(45, here.fileno(), buffer, 8, 0, 0, 0)
            except OSError as e:
                results.append((e.errno, time.monotonic() - begin))

    thread = threading.Thread(target=receive)
    thread.start()
    wait_for(lambda: results, "it has waited once")
    yield
    end.append(1)
    there.send(b"enough")
    thread.join()
    assert len(results) > 3, "it has hardly waited"
    for error, lasted in results:
        equal(error, EAGAIN)
        assert lasted > 0.398, f"it waited {lasted} s"
        assert lasted < 10, f"it waited {lasted} s: it began anew at each stop"


@kind
def shell_with_children_and_pipes():
    script = """
        i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done |
        while read n; do echo $(echo $n | sed 's/^/line /') > count.new; mv count.new count; done
    """
    subprocess.Popen(["sh", "-c", script])
    count = lambda: int(open("count").read().split()[1]) if os.path.exists("count") else 0
    wait_for(lambda: count() > 3, "it counts")
    yield
    before = count()
    assert before > 3
    wait_for(lambda: count() > before + 5, "it counts on")


@kind
def python_with_asyncio():
    async def ticks(every, list_):
        while True:
            await asyncio.sleep(every)
            list_.append(time.monotonic())

    async def talk(server_side, client_side, list_):
        # Both ends are kept: one that is forgotten is closed.
        reader, *kept = await asyncio.open_connection(sock=server_side)
        *kept, writer = kept + list(await asyncio.open_connection(sock=client_side))
        while True:
            writer.write(b"line\n")
            list_.append(await reader.readline())
            await asyncio.sleep(0.01)

    lists = [], [], []

    def run():
        async def all_():
            here, there = socket.socketpair()
            await asyncio.gather(
                ticks(0.01, lists[0]), ticks(0.025, lists[1]), talk(here, there, lists[2]))

        asyncio.run(all_())

    threading.Thread(target=run, daemon=True).start()
    wait_for(lambda: all(len(l) > 3 for l in lists), "it runs")
    yield
    before = [len(l) for l in lists]
    wait_for(lambda: all(len(l) > n + 5 for l, n in zip(lists, before)), "it goes on")
    equal(set(lists[2]), {b"line\n"})


@kind
def epoll_of_numbers_that_mean_something_else():
    epoll, socks, pipe_ends = Epoll(), socket.socketpair(), os.pipe()
    number = os.dup2(socks[0].fileno(), 200)
    epoll.register(number, EPOLLIN)
    os.dup2(pipe_ends[0], number)
    epoll.register(number, EPOLLIN)
    # A file that another process has, under a number that is free.
    low, high = os.pipe()
    os.dup2(low, 201)
    epoll.register(201, EPOLLIN)
    pid = os.fork()
    if pid == 0:
        os.close(201)
        os.read(low, 1)
        signal.pause()
    os.close(201)
    os.close(low)
    yield
    equal(epoll.poll(0), [], "at first")
    socks[1].send(b"s")
    equal(epoll.poll(60), [(200, EPOLLIN)], "what the number was")
    os.write(pipe_ends[1], b"p")
    equal(epoll.poll(60), [(200, EPOLLIN)] * 2, "what it was and what it is")
    equal((socks[0].recv(9), os.read(200, 9)), (b"s", b"p"))
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    os.write(high, b"x")
    equal(epoll.poll(60), [(201, EPOLLIN)], "what only a child has")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    equal(epoll.poll(0), [], "it has gone with the child")


# The first process


def run(name):
    try:
        steps = KINDS[name]()
        next(steps)
        say(f"ready {name}")
        wait_for(lambda: os.path.exists("verify"), "it is asked to look again")
        for _ in steps:
            pass
        say(f"kind {name} ok")
    except BaseException:
        say(f"kind {name} FAILED\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def main():
    names = GROUPS.get(sys.argv[1], sys.argv[1:])
    say(f"kinds {len(names)}")
    for name in names:
        if os.fork() == 0:
            run(name)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


main()
