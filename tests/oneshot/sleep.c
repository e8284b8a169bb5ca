/* Waits that are interrupted by nothing: nanosleep, poll, select, futex, read. */
#include "oneshot.h"
#include <sys/epoll.h>
#include <sys/select.h>
static int quiet[2], epoll;
static void *sleeping(void *arg) {
    (void)arg;
    struct timespec t = {1, 500000000};
    uint64_t from = now();
    CHECK(nanosleep(&t, 0) == 0);
    CHECK(now() - from >= 1500000000ull);
    return 0;
}
static void *polling(void *arg) {
    (void)arg;
    struct pollfd p = {quiet[0], POLLIN, 0};
    CHECK(poll(&p, 1, 1500) == 0);
    return 0;
}
static void *selecting(void *arg) {
    (void)arg;
    fd_set set;
    FD_ZERO(&set);
    FD_SET(quiet[0], &set);
    struct timeval t = {1, 500000};
    CHECK(select(quiet[0] + 1, &set, 0, 0, &t) == 0);
    return 0;
}
static void *watching(void *arg) {
    (void)arg;
    struct epoll_event event;
    CHECK(epoll_wait(epoll, &event, 1, 1500) == 0);
    return 0;
}
static void *reading(void *arg) {
    (void)arg;
    char c;
    CHECK(read(quiet[0], &c, 1) == 1 && c == '!');
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(quiet) == 0 && (epoll = epoll_create1(0)) >= 0);
    struct epoll_event event = {.events = EPOLLIN};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, quiet[0], &event) == 0);
    void *(*const waits[])(void *) = {sleeping, polling, selecting, watching, reading};
    pthread_t threads[5];
    for (int i = 0; i < 5; i++) CHECK(pthread_create(&threads[i], 0, waits[i], 0) == 0);
    ready();
    wait_for_term();
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], 0) == 0);
    put(quiet[1], "!", 1);
    CHECK(pthread_join(threads[4], 0) == 0);
    verdict("PASS");
}
