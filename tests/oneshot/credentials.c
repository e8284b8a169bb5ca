/* Who is at the other end of a unix socket, and who sent what waits in its queue. */
#include "oneshot.h"
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>
static int report[2];
static socklen_t name_it(struct sockaddr_un *a) {
    *a = (struct sockaddr_un){.sun_family = AF_UNIX};
    int n = snprintf(a->sun_path + 1, sizeof a->sun_path - 1, "nilicon-credentials-%d", getpid());
    return offsetof(struct sockaddr_un, sun_path) + n + 1;
}
static int peer_is(int socket, pid_t pid, uid_t uid, gid_t gid) {
    struct ucred c;
    socklen_t n = sizeof c;
    CHECK(getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &c, &n) == 0 && n == sizeof c);
    return c.pid == pid && c.uid == uid && c.gid == gid;
}
static void say(int socket, const char *word, pid_t pid, uid_t uid, gid_t gid) {
    struct ucred who = {pid, uid, gid};
    char control[CMSG_SPACE(sizeof who)] = {0};
    struct iovec iov = {(void *)word, strlen(word)};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                       .msg_controllen = sizeof control};
    *CMSG_FIRSTHDR(&m) = (struct cmsghdr){CMSG_LEN(sizeof who), SOL_SOCKET, SCM_CREDENTIALS};
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &who, sizeof who);
    CHECK(sendmsg(socket, &m, 0) == (ssize_t)strlen(word));
}
static int heard(int socket, const char *word, pid_t pid, uid_t uid, gid_t gid) {
    char text[64], control[256];
    struct iovec iov = {text, sizeof text};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
                       .msg_controllen = sizeof control};
    ssize_t n = recvmsg(socket, &m, MSG_DONTWAIT);
    if (n != (ssize_t)strlen(word) || memcmp(text, word, n)) return 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_CREDENTIALS) return 0;
    struct ucred who;
    memcpy(&who, CMSG_DATA(c), sizeof who);
    return who.pid == pid && who.uid == uid && who.gid == gid;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0);
    struct sockaddr_un a;
    socklen_t n = name_it(&a);
    int stream[2], datagrams[2], records[2], on = 1, is_on = 0;
    socklen_t size = sizeof is_on;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, records) == 0);
    int *pairs[3] = {stream, datagrams, records};
    for (int i = 0; i < 3; i++)
        CHECK(setsockopt(pairs[i][0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == 0);
    /* Whoever listens is its own peer until somebody comes; then the one who came. */
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(bind(listener, (void *)&a, n) == 0 && listen(listener, 5) == 0);
    pid_t child = fork();
    if (!child) {
        CHECK(setresgid(1701, 1701, 1701) == 0 && setresuid(1700, 1700, 1700) == 0);
        int client = socket(AF_UNIX, SOCK_STREAM, 0), late = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(connect(client, (void *)&a, n) == 0 && connect(late, (void *)&a, n) == 0);
        for (int i = 0; i < 3; i++) say(pairs[i][1], "from a child", getpid(), 1700, 1701);
        put(report[1], "r", 1);
        told = 0;
        wait_for_term();
        CHECK(peer_is(client, getppid(), 0, 0) && peer_is(late, getppid(), 0, 0));
        _exit(3);
    }
    char byte;
    get(report[0], &byte, 1);
    int accepted = accept(listener, 0, 0);
    CHECK(accepted >= 0);
    /* Root may speak for others. */
    for (int i = 0; i < 3; i++) say(pairs[i][1], "for others", getpid(), 42, 43);
    ready();
    wait_for_term();
    CHECK(peer_is(accepted, child, 1700, 1701) && peer_is(stream[0], getpid(), 0, 0));
    CHECK(peer_is(records[1], getpid(), 0, 0) && peer_is(listener, getpid(), 0, 0));
    int waited = accept(listener, 0, 0);
    CHECK(waited >= 0 && peer_is(waited, child, 1700, 1701));
    for (int i = 0; i < 3; i++) {
        CHECK(heard(pairs[i][0], "from a child", child, 1700, 1701));
        CHECK(heard(pairs[i][0], "for others", getpid(), 42, 43));
        CHECK(getsockopt(pairs[i][0], SOL_SOCKET, SO_PASSCRED, &is_on, &size) == 0 && is_on == 1);
        CHECK(getsockopt(pairs[i][1], SOL_SOCKET, SO_PASSCRED, &is_on, &size) == 0 && is_on == 0);
        put(pairs[i][1], "of itself", 9);
        CHECK(heard(pairs[i][0], "of itself", getpid(), 0, 0));
    }
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
