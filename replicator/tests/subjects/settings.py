# Changes one thing after the other, each when it is told to.
import ctypes, os, resource, signal, threading, time

libc = ctypes.CDLL(None, use_errno=True)


def told(name):
    while not os.path.exists(name):
        time.sleep(0.002)


def prctl(option, value):
    assert libc.prctl(option, value, 0, 0, 0) == 0


def altstack():
    class Stack(ctypes.Structure):
        _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    global area
    area = ctypes.create_string_buffer(65536)
    stack = Stack(ctypes.addressof(area), 0, 65536)
    assert libc.sigaltstack(ctypes.byref(stack), None) == 0


def wait_for_nothing():
    # Signals that are blocked for the time of a call alone.
    threading.Thread(target=lambda: signal.sigtimedwait([signal.SIGUSR2], 600), daemon=True).start()
    time.sleep(0.05)


def sbrk():
    libc.sbrk.restype = ctypes.c_void_p
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.sbrk(1 << 20)


CHANGES = [
    lambda: signal.signal(signal.SIGUSR1, lambda *_: None),
    lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
    lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
    lambda: signal.siginterrupt(signal.SIGTERM, False),
    lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, signal.SIGWINCH]),
    lambda: os.kill(os.getpid(), signal.SIGHUP),
    lambda: signal.pthread_kill(threading.get_ident(), signal.SIGWINCH),
    altstack,
    sbrk,
    lambda: prctl(29, 77_000),  # PR_SET_TIMERSLACK
    lambda: prctl(15, b"renamed"),  # PR_SET_NAME
    lambda: prctl(1, 10),  # PR_SET_PDEATHSIG
    lambda: prctl(4, 0),  # PR_SET_DUMPABLE
    lambda: prctl(4, 1),
    lambda: prctl(36, 1),  # PR_SET_CHILD_SUBREAPER
    lambda: prctl(41, 1),  # PR_SET_THP_DISABLE
    lambda: libc.personality(0x0040000),  # ADDR_NO_RANDOMIZE
    lambda: libc.syscall(324, 16, 0, 0),  # membarrier: REGISTER_PRIVATE_EXPEDITED
    lambda: signal.setitimer(signal.ITIMER_REAL, 500, 700),
    lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 500),
    lambda: signal.setitimer(signal.ITIMER_REAL, 0),
    lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 0),
    wait_for_nothing,
    lambda: os.setresuid(-1, -1, 65534),
    lambda: os.setresuid(-1, -1, 0),
    # What is read from outside.
    lambda: os.umask(0o057),
    lambda: os.mkdir(f"{home}/place") or os.chdir(f"{home}/place"),
    lambda: os.setgroups([5, 50, 500]),
    lambda: os.setgroups([5, 51, 500]),
    lambda: os.setgroups(range(1, 60)),
    lambda: os.setresgid(-1, 7, -1),
    lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 999)),
    lambda: open("/proc/self/oom_score_adj", "w").write("77"),
    lambda: os.nice(3),
    lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
    lambda: os.sched_setaffinity(0, [max(os.sched_getaffinity(0))]),
    lambda: libc.syscall(251, 1, 0, 3 << 13),  # ioprio_set
    lambda: prctl(24, 30),  # PR_CAPBSET_DROP
    lambda: os.chroot("/"),
]
home = os.getcwd()
print("ready", flush=True)
for number, change in enumerate(CHANGES):
    told(f"{home}/go{number}")
    change()
    open(f"{home}/done{number}", "w").close()
print("through", flush=True)
told(f"{home}/end")
