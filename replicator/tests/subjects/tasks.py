"""What processes and threads can have besides memory and descriptors, each kind in a process of
its own that notices if any of it is wrong after a restore.

A kind is a generator: it sets up what it has, yields, and looks again. The first process starts
all kinds and prints "ready" when they are set up; each prints "kind NAME ok" in the end.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback

libc = ctypes.CDLL(None, use_errno=True)
KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
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
    thread.join()
    result, lasted = done[0]
    assert WAIT - 0.002 <= lasted <= WAIT + 1.5, f"it lasted {lasted} s instead of {WAIT}"
    return result


def waits(wanted):
    def decorate(begin):
        def run():
            result = yield from waiting(begin)
            equal(result, wanted, "the result")

        run.__name__ = "wait_of_" + begin.__name__
        KINDS[run.__name__] = run
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
    names = sys.argv[1:] or list(KINDS)
    for name in names:
        if os.fork() == 0:
            run(name)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


main()
