/* Epoll instances that watch files whose numbers were closed, or are other files' by now. */
#include "oneshot.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
static int epoll;
static void watch(int fd, uint64_t data, uint32_t flags) {
    struct epoll_event event = {.events = EPOLLIN | flags, .data.u64 = data};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
}
/* The data of exactly these events comes, whatever their order. */
static void expect(int count, const uint64_t *wanted) {
    struct epoll_event events[16];
    int n = epoll_wait(epoll, events, 16, count ? 60000 : 0);
    if (n != count) FAIL("%d events instead of %d, the first with %d", n, count, n > 0 ? (int)events[0].data.u64 : 0);
    for (int i = 0; i < count; i++) {
        int found = 0;
        for (int k = 0; k < n; k++) found += events[k].data.u64 == wanted[i];
        if (found != 1) FAIL("%d events with %d", found, (int)wanted[i]);
    }
}
static void send_fd(int socket, int fd) {
    char control[CMSG_SPACE(sizeof fd)] = {0}, byte = 'f';
    struct iovec iov = {&byte, 1};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                       .msg_controllen = sizeof control};
    *CMSG_FIRSTHDR(&m) = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof fd);
    CHECK(sendmsg(socket, &m, 0) == 1);
}
static uint64_t count_of(int event) {
    uint64_t n;
    return read(event, &n, sizeof n) == sizeof n ? n : 0;
}
static void add_to(int event) {
    uint64_t one = 1;
    put(event, &one, sizeof one);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK((epoll = epoll_create1(0)) >= 0);
    /* 1: number 100 was a socket, and is a pipe now; both are watched under it. */
    int pair[2], pipes[2], carrier[2], flying[2];
    char byte;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && pipe(pipes) == 0);
    CHECK(dup2(pair[0], 100) == 100);
    watch(100, 1, 0);
    CHECK(dup2(pipes[0], 100) == 100);
    watch(100, 2, 0);
    /* 2: two counters, which the kernel gives one inode, have changed their numbers. */
    int a = eventfd(0, EFD_NONBLOCK), b = eventfd(0, EFD_NONBLOCK);
    CHECK(dup2(a, 101) == 101 && dup2(b, 102) == 102);
    watch(101, 3, EPOLLET);
    watch(102, 4, EPOLLET);
    CHECK(dup2(b, 101) == 101 && dup2(a, 102) == 102);
    /* 3: one that only a child has, under a number that nobody has. */
    int orphan = eventfd(0, EFD_NONBLOCK), own = dup2(orphan, 103);
    CHECK(own == 103);
    watch(103, 5, 0);
    pid_t child = fork();
    if (!child) {
        close(103);
        sigset_t usr;
        sigemptyset(&usr);
        sigaddset(&usr, SIGUSR1);
        int got;
        sigprocmask(SIG_BLOCK, &usr, 0);
        told = 0;
        wait_for_term();
        add_to(orphan);
        sigwait(&usr, &got);
        _exit(3);
    }
    close(103), close(orphan);
    /* 4: one that is in nobody's hands: it travels in a message. */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, carrier) == 0 && pipe(flying) == 0);
    watch(flying[0], 6, 0);
    send_fd(carrier[0], flying[0]);
    close(flying[0]);
    /* 5: one that is gone leaves nothing, and its number is free. */
    int gone[2];
    CHECK(pipe(gone) == 0);
    watch(gone[0], 7, 0);
    close(gone[0]);
    ready();
    wait_for_term();
    expect(0, 0);
    put(pair[1], "s", 1);
    expect(1, (uint64_t[]){1});
    put(pipes[1], "p", 1);
    expect(2, (uint64_t[]){1, 2});
    get(pair[0], &byte, 1), get(100, &byte, 1);
    CHECK(byte == 'p');
    add_to(a);
    expect(1, (uint64_t[]){3});
    add_to(101);
    expect(1, (uint64_t[]){4});
    CHECK(count_of(a) == 1 && count_of(b) == 1);
    CHECK(kill(child, SIGTERM) == 0);
    expect(1, (uint64_t[]){5});
    int status;
    CHECK(kill(child, SIGUSR1) == 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
    /* The last one that had it has gone. */
    expect(0, 0);
    put(flying[1], "f", 1);
    expect(1, (uint64_t[]){6});
    close(carrier[0]), close(carrier[1]);
    expect(0, 0);
    /* What a number is now can be taken out, and what it was cannot. */
    CHECK(epoll_ctl(epoll, EPOLL_CTL_DEL, 100, 0) == 0);
    CHECK(epoll_ctl(epoll, EPOLL_CTL_DEL, 100, 0) == -1 && errno == ENOENT);
    put(pair[1], "s", 1), put(pipes[1], "p", 1);
    expect(1, (uint64_t[]){1});
    verdict("PASS");
}
