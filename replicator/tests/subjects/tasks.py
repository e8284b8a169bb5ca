"""What processes and threads can have besides memory and descriptors, each kind in a process of
its own that notices if any of it is wrong after a restore.

A kind is a generator: it sets up what it has, yields, and looks again. The first process starts
all kinds and prints "ready" when they are set up; each prints "kind NAME ok" in the end.
"""

import ctypes
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
