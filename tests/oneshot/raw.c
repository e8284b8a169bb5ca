/* Raw, ICMP and netlink sockets. */
#include "oneshot.h"
#include <arpa/inet.h>
#include <linux/icmp.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <sys/socket.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    int raw = socket(AF_INET, SOCK_RAW, 253), one = 1, got;
    CHECK(raw >= 0 && setsockopt(raw, IPPROTO_IP, IP_HDRINCL, &one, sizeof one) == 0);
    struct icmp_filter none = {~0u}, filter;
    int icmp = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
    CHECK(setsockopt(icmp, SOL_RAW, ICMP_FILTER, &none, sizeof none) == 0);
    int route = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    struct sockaddr_nl own = {.nl_family = AF_NETLINK}, found;
    socklen_t n = sizeof own;
    CHECK(bind(route, (void *)&own, n) == 0 && getsockname(route, (void *)&own, &n) == 0);
    ready();
    wait_for_term();
    n = sizeof got;
    CHECK(getsockopt(raw, IPPROTO_IP, IP_HDRINCL, &got, &n) == 0 && got == 1);
    CHECK(getsockopt(raw, SOL_SOCKET, SO_PROTOCOL, &got, &n) == 0 && got == 253);
    n = sizeof filter;
    CHECK(getsockopt(icmp, SOL_RAW, ICMP_FILTER, &filter, &n) == 0 && filter.data == ~0u);
    n = sizeof found;
    CHECK(getsockname(route, (void *)&found, &n) == 0 && found.nl_pid == own.nl_pid);
    struct {
        struct nlmsghdr head;
        struct rtgenmsg body;
    } ask = {{NLMSG_LENGTH(sizeof ask.body), RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0}, {AF_UNSPEC}};
    CHECK(send(route, &ask, ask.head.nlmsg_len, 0) == (ssize_t)ask.head.nlmsg_len);
    static char answer[65536] __attribute__((aligned(8)));
    CHECK(recv(route, answer, sizeof answer, 0) > 0);
    CHECK(((struct nlmsghdr *)answer)->nlmsg_type == RTM_NEWLINK);
    verdict("PASS");
}
