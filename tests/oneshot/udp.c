/* UDP: queues with their senders, connected sockets, IPv6, options. */
#include "oneshot.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    int a = socket(AF_INET, SOCK_DGRAM, 0), b = socket(AF_INET, SOCK_DGRAM, 0), one = 1, size = 70000;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in from = to, sender;
    socklen_t n = sizeof to;
    CHECK(bind(a, (void *)&to, n) == 0 && getsockname(a, (void *)&to, &n) == 0);
    CHECK(bind(b, (void *)&from, n) == 0 && getsockname(b, (void *)&from, &n) == 0);
    CHECK(connect(b, (void *)&to, n) == 0);
    CHECK(setsockopt(a, SOL_SOCKET, SO_BROADCAST, &one, sizeof one) == 0);
    CHECK(setsockopt(a, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) == 0);
    CHECK(setsockopt(a, IPPROTO_IP, IP_PKTINFO, &one, sizeof one) == 0);
    char text[100];
    for (int i = 0; i < 20; i++) {
        snprintf(text, sizeof text, "datagram %d", i);
        CHECK(send(b, text, 8 + i, 0) == 8 + i);
    }
    int six = socket(AF_INET6, SOCK_DGRAM, 0);
    struct sockaddr_in6 self = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t m = sizeof self;
    int has_six = bind(six, (void *)&self, m) == 0;
    if (has_six) {
        CHECK(getsockname(six, (void *)&self, &m) == 0 && connect(six, (void *)&self, m) == 0);
        CHECK(send(six, "to itself", 9, 0) == 9);
    }
    ready();
    wait_for_term();
    for (int i = 0; i < 20; i++) {
        n = sizeof sender;
        CHECK(recvfrom(a, text, sizeof text, MSG_DONTWAIT, (void *)&sender, &n) == 8 + i);
        CHECK(sender.sin_port == from.sin_port && !memcmp(text, "datagram", 8));
    }
    CHECK(recv(a, text, sizeof text, MSG_DONTWAIT) == -1 && errno == EAGAIN);
    CHECK(sendto(a, "answer", 6, 0, (void *)&from, sizeof from) == 6);
    CHECK(recv(b, text, sizeof text, 0) == 6 && !memcmp(text, "answer", 6));
    if (has_six) CHECK(recv(six, text, sizeof text, MSG_DONTWAIT) == 9);
    int got;
    n = sizeof got;
    CHECK(getsockopt(a, SOL_SOCKET, SO_BROADCAST, &got, &n) == 0 && got == 1);
    CHECK(getsockopt(a, SOL_SOCKET, SO_RCVBUF, &got, &n) == 0 && got == 140000);
    CHECK(getsockopt(a, IPPROTO_IP, IP_PKTINFO, &got, &n) == 0 && got == 1);
    n = sizeof sender;
    CHECK(getpeername(b, (void *)&sender, &n) == 0 && sender.sin_port == to.sin_port);
    verdict("PASS");
}
