/* Named pipes with contents, and a pipe of packets. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    char name[PATH_MAX], text[64];
    snprintf(name, sizeof name, "%s.fifo", outfile);
    unlink(name);
    CHECK(mkfifo(name, 0600) == 0);
    int both = open(name, O_RDWR), reader = open(name, O_RDONLY | O_NONBLOCK);
    int writer = open(name, O_WRONLY), packets[2];
    CHECK(both >= 0 && reader >= 0 && writer >= 0 && pipe2(packets, O_DIRECT | O_NONBLOCK) == 0);
    put(writer, "in the fifo", 11);
    put(packets[1], "one", 3), put(packets[1], "three", 5);
    ready();
    wait_for_term();
    CHECK(read(reader, text, 64) == 11 && !memcmp(text, "in the fifo", 11));
    CHECK(read(reader, text, 64) == -1 && errno == EAGAIN);
    CHECK(read(packets[0], text, 64) == 3 && read(packets[0], text, 64) == 5);
    CHECK(read(packets[0], text, 64) == -1 && errno == EAGAIN);
    put(both, "x", 1);
    get(reader, text, 1);
    int late = open(name, O_WRONLY | O_NONBLOCK);
    put(late, "late", 4);
    CHECK(read(both, text, 64) == 4);
    close(both), close(writer), close(late);
    CHECK(read(reader, text, 1) == 0);
    verdict("PASS");
}
