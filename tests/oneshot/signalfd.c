/* signalfd with signals that wait, and its mask; one within epoll. */
#include "oneshot.h"
#include <sys/epoll.h>
#include <sys/signalfd.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    sigset_t one, two, both;
    sigemptyset(&one);
    sigaddset(&one, SIGRTMIN + 5);
    sigemptyset(&two);
    sigaddset(&two, SIGUSR2);
    both = one;
    sigaddset(&both, SIGUSR2);
    CHECK(sigprocmask(SIG_BLOCK, &both, 0) == 0);
    int first = signalfd(-1, &one, SFD_NONBLOCK), second = signalfd(-1, &two, SFD_CLOEXEC);
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = 3};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, first, &event) == 0);
    for (int i = 0; i < 3; i++) CHECK(sigqueue(getpid(), SIGRTMIN + 5, (union sigval){i}) == 0);
    CHECK(kill(getpid(), SIGUSR2) == 0);
    ready();
    wait_for_term();
    struct signalfd_siginfo info;
    CHECK(epoll_wait(epoll, &event, 1, 0) == 1 && event.data.u32 == 3);
    for (int i = 0; i < 3; i++) {
        get(first, &info, sizeof info);
        CHECK(info.ssi_signo == (unsigned)SIGRTMIN + 5 && info.ssi_int == i);
        CHECK(info.ssi_pid == (unsigned)getpid() && info.ssi_code == SI_QUEUE);
    }
    CHECK(read(first, &info, sizeof info) == -1 && errno == EAGAIN);
    get(second, &info, sizeof info);
    CHECK(info.ssi_signo == SIGUSR2 && fcntl(second, F_GETFD) == FD_CLOEXEC);
    CHECK(kill(getpid(), SIGUSR2) == 0);
    get(second, &info, sizeof info);
    CHECK(info.ssi_signo == SIGUSR2);
    verdict("PASS");
}
