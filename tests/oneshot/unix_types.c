/* Unix sockets of every type: named, abstract, waiting to be accepted, with descriptors in flight. */
#include "oneshot.h"
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>
static socklen_t name_it(struct sockaddr_un *a, const char *name) {
    *a = (struct sockaddr_un){.sun_family = AF_UNIX};
    int n = snprintf(a->sun_path + (*name == '@'), sizeof a->sun_path - 1, "%s", name + (*name == '@'));
    return offsetof(struct sockaddr_un, sun_path) + n + 1;
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
static int take_fd(int socket) {
    int fd;
    char control[CMSG_SPACE(sizeof fd)], byte;
    struct iovec iov = {&byte, 1};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                       .msg_controllen = sizeof control};
    CHECK(recvmsg(socket, &m, 0) == 1 && byte == 'f' && CMSG_FIRSTHDR(&m));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    char abstract[64], text[64];
    struct sockaddr_un a;
    socklen_t n;
    snprintf(abstract, sizeof abstract, "@nilicon-oneshot-%d", getpid());
    int datagrams[2], sequence[2], stream[2], inner[2], plain[2];
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, sequence) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, inner) == 0 && pipe(plain) == 0);
    put(datagrams[0], "one", 3), put(datagrams[0], "second", 6);
    put(sequence[1], "record", 6), put(sequence[1], "next", 4);
    put(plain[1], "in flight", 9);
    put(inner[0], "within", 6);
    send_fd(stream[0], plain[0]);
    send_fd(stream[0], inner[1]);
    close(plain[0]), close(inner[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), pending = socket(AF_UNIX, SOCK_STREAM, 0);
    n = name_it(&a, abstract);
    CHECK(bind(listener, (void *)&a, n) == 0 && listen(listener, 5) == 0);
    CHECK(connect(pending, (void *)&a, n) == 0);
    int half[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, half) == 0);
    put(half[0], "the end", 7);
    CHECK(shutdown(half[0], SHUT_WR) == 0);
    char path[100];
    snprintf(path, sizeof path, "/tmp/nilicon-oneshot-%d.sock", getpid());
    int named = socket(AF_UNIX, SOCK_DGRAM, 0), sender = socket(AF_UNIX, SOCK_DGRAM, 0);
    socklen_t m = name_it(&a, path);
    unlink(path);
    CHECK(bind(named, (void *)&a, m) == 0 && connect(sender, (void *)&a, m) == 0);
    put(sender, "to a name", 9);
    ready();
    wait_for_term();
    CHECK(recv(datagrams[1], text, 64, 0) == 3 && recv(datagrams[1], text, 64, 0) == 6);
    CHECK(recv(sequence[0], text, 64, 0) == 6 && recv(sequence[0], text, 64, 0) == 4);
    CHECK(recv(sequence[0], text, 64, 0) == -1 && errno == EAGAIN);
    int pipe_end = take_fd(stream[1]), socket_end = take_fd(stream[1]);
    get(pipe_end, text, 9);
    CHECK(!memcmp(text, "in flight", 9));
    get(socket_end, text, 6);
    CHECK(!memcmp(text, "within", 6));
    put(socket_end, "back", 4);
    get(inner[0], text, 4);
    int accepted = accept(listener, 0, 0);
    CHECK(accepted >= 0);
    put(pending, "hello", 5);
    get(accepted, text, 5);
    CHECK(!memcmp(text, "hello", 5));
    get(half[1], text, 7);
    CHECK(read(half[1], text, 1) == 0);
    put(half[1], "answer", 6);
    get(half[0], text, 6);
    CHECK(recv(named, text, 64, 0) == 9 && !memcmp(text, "to a name", 9));
    put(sender, "more", 4);
    CHECK(recv(named, text, 64, 0) == 4 && unlink(path) == 0);
    int late = socket(AF_UNIX, SOCK_STREAM, 0);
    n = name_it(&a, abstract);
    CHECK(connect(late, (void *)&a, n) == 0 && accept(listener, 0, 0) >= 0);
    verdict("PASS");
}
