/* Connections that one side has closed, and that nobody holds there any more: refused. */
#include "../oneshot.h"
#include <arpa/inet.h>
#include <sys/socket.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof to;
    int listener = socket(AF_INET, SOCK_STREAM, 0), left[2], unread[2];
    CHECK(bind(listener, (void *)&to, n) == 0 && getsockname(listener, (void *)&to, &n) == 0);
    CHECK(listen(listener, 5) == 0);
    int *const pairs[] = {left, unread};
    for (int i = 0; i < 2; i++) {
        CHECK((pairs[i][0] = socket(AF_INET, SOCK_STREAM, 0)) >= 0);
        CHECK(connect(pairs[i][0], (void *)&to, sizeof to) == 0);
        CHECK((pairs[i][1] = accept(listener, 0, 0)) >= 0);
    }
    put(unread[0], "last words", 10);
    close(left[0]);
    close(unread[0]);
    struct pollfd ended = {left[1], POLLRDHUP, 0};
    CHECK(poll(&ended, 1, 60000) == 1);
    ended.fd = unread[1];
    CHECK(poll(&ended, 1, 60000) == 1);
    ready();
    wait_for_term();
    char text[20];
    get(unread[1], text, 10);
    CHECK(!memcmp(text, "last words", 10) && read(unread[1], text, 1) == 0);
    CHECK(read(left[1], text, 1) == 0);
    put(left[1], "nobody hears it", 15);
    verdict("PASS");
}
