/* A long sleep that a signal ends, and a signal alone: whenever it comes. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    sigset_t none;
    sigemptyset(&none);
    ready();
    CHECK(sigprocmask(SIG_SETMASK, &none, 0) == 0);
    struct timespec long_time = {100000, 0};
    int r = told ? EINTR : clock_nanosleep(CLOCK_MONOTONIC, 0, &long_time, 0);
    if (r != EINTR || !told) FAIL("the sleep ended with %d, told %d", r, (int)told);
    CHECK(long_time.tv_sec == 100000 && long_time.tv_nsec == 0);
    verdict("PASS");
}
