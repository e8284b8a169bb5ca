/* Pipes: contents, size, flags; a second description of one end. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    int plain[2], big[2], full[2];
    CHECK(pipe(plain) == 0 && pipe2(big, O_NONBLOCK | O_CLOEXEC) == 0 && pipe2(full, O_NONBLOCK) == 0);
    CHECK(fcntl(big[1], F_SETPIPE_SZ, 1 << 20) >= 1 << 20);
    static char block[300000], back[300000];
    for (size_t i = 0; i < sizeof block; i++) block[i] = i * 31 >> 3;
    put(plain[1], "in the pipe", 11);
    put(big[1], block, sizeof block);
    size_t held = 0;
    for (ssize_t w; (w = write(full[1], block, 4096)) > 0;) held += w;
    int copy = dup(plain[0]);
    CHECK(copy >= 0 && errno == EAGAIN);
    ready();
    wait_for_term();
    char text[11];
    get(copy, text, 11);
    CHECK(!memcmp(text, "in the pipe", 11));
    get(big[0], back, sizeof back);
    CHECK(!memcmp(block, back, sizeof back));
    CHECK(fcntl(big[0], F_GETPIPE_SZ) >= 1 << 20 && fcntl(big[0], F_GETFD) == FD_CLOEXEC);
    CHECK(read(big[0], back, 1) == -1 && errno == EAGAIN);
    CHECK(write(full[1], block, 4096) == -1 && errno == EAGAIN);
    for (; held; held -= 4096) get(full[0], back, 4096);
    close(plain[1]);
    CHECK(read(plain[0], back, 1) == 0);
    verdict("PASS");
}
