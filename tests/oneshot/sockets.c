/* Sockets on the loopback: a listener, connections with bytes on their way, pairs, datagrams. */
#include "oneshot.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
static struct sockaddr_in bound(int fd) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    CHECK(bind(fd, (void *)&a, n) == 0 && getsockname(fd, (void *)&a, &n) == 0);
    return a;
}
static int connected(struct sockaddr_in to, int listener, int *accepted) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(fd, (void *)&to, sizeof to) == 0);
    CHECK((*accepted = accept(listener, 0, 0)) >= 0);
    return fd;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1, accepted[3], client[3], pair[2];
    struct sockaddr_in to = bound(listener);
    CHECK(listen(listener, 9) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    for (int i = 0; i < 3; i++) client[i] = connected(to, listener, &accepted[i]);
    CHECK(setsockopt(client[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0);
    static char block[100000], back[100000];
    for (size_t i = 0; i < sizeof block; i++) block[i] = i * 7 >> 2;
    put(client[1], block, sizeof block);
    put(accepted[2], "to the client", 13);
    put(pair[0], "to the pair", 11);
    int datagrams = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in port = bound(datagrams);
    ready();
    wait_for_term();
    int got;
    socklen_t n = sizeof got;
    CHECK(getsockopt(client[0], IPPROTO_TCP, TCP_NODELAY, &got, &n) == 0 && got);
    get(accepted[1], back, sizeof back);
    CHECK(!memcmp(block, back, sizeof back));
    get(client[2], back, 13);
    CHECK(!memcmp(back, "to the client", 13));
    get(pair[1], back, 11);
    CHECK(!memcmp(back, "to the pair", 11));
    for (int i = 0; i < 3; i++)
        for (int round = 0; round < 3; round++) {
            put(client[i], block, 5000);
            get(accepted[i], back, 5000);
            CHECK(!memcmp(block, back, 5000));
            put(accepted[i], block + 5000, 5000);
            get(client[i], back, 5000);
            CHECK(!memcmp(block + 5000, back, 5000));
        }
    int late, fresh = connected(to, listener, &late);
    put(fresh, "new", 3);
    get(late, back, 3);
    CHECK(!memcmp(back, "new", 3));
    close(client[0]);
    CHECK(read(accepted[0], back, 1) == 0);
    CHECK(sendto(pair[0], "x", 1, 0, 0, 0) == 1);
    int sender = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(sendto(sender, "datagram", 8, 0, (void *)&port, sizeof port) == 8);
    CHECK(recv(datagrams, back, 100, 0) == 8);
    verdict("PASS");
}
