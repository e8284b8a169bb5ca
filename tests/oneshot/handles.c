/* Handles of processes and namespaces; who is told of input on a descriptor. */
#include "oneshot.h"
#include <sched.h>
#include <sys/socket.h>
#include <sys/syscall.h>
static volatile sig_atomic_t signals, on_fd;
static void on_input(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    signals++;
    on_fd = info->si_fd;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction action = {.sa_sigaction = on_input, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN + 7, &action, 0) == 0);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(fcntl(pair[0], F_SETSIG, SIGRTMIN + 7) == 0 && fcntl(pair[0], F_SETOWN, getpid()) == 0);
    CHECK(fcntl(pair[0], F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    pid_t child = fork();
    if (!child) {
        wait_for_term();
        _exit(3);
    }
    int handle = syscall(SYS_pidfd_open, child, 0), own = open("/proc/self/ns/net", O_RDONLY);
    CHECK(handle >= 0 && own >= 0);
    ready();
    wait_for_term();
    CHECK(fcntl(pair[0], F_GETSIG) == SIGRTMIN + 7 && fcntl(pair[0], F_GETOWN) == getpid());
    put(pair[1], "x", 1);
    uint64_t until = now() + 60000000000ull;
    while (!signals) CHECK(now() < until);
    CHECK(on_fd == pair[0]);
    struct pollfd ended = {handle, POLLIN, 0};
    siginfo_t info;
    CHECK(poll(&ended, 1, 0) == 0 && syscall(SYS_pidfd_send_signal, handle, SIGTERM, 0, 0) == 0);
    CHECK(poll(&ended, 1, 60000) == 1);
    CHECK(waitid(P_PIDFD, handle, &info, WEXITED) == 0 && info.si_pid == child && info.si_status == 3);
    CHECK(setns(own, CLONE_NEWNET) == 0);
    struct stat a, b;
    CHECK(fstat(own, &a) == 0 && stat("/proc/self/ns/net", &b) == 0 && a.st_ino == b.st_ino);
    verdict("PASS");
}
