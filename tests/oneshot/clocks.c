/* Clocks by the vdso and by system calls: they agree, and go on without a step back. */
#include "oneshot.h"
#include <sys/syscall.h>
#include <sys/time.h>
static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME, CLOCK_MONOTONIC_RAW};
static uint64_t read_clock(clockid_t clock, int by_call) {
    struct timespec t;
    CHECK((by_call ? syscall(SYS_clock_gettime, clock, &t) : clock_gettime(clock, &t)) == 0);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    uint64_t last[4] = {0};
    sigset_t none;
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_SETMASK, &none, 0) == 0);
    for (long i = 0; !told; i++) {
        if (i == 100) ready();
        for (int c = 0; c < 4; c++)
            for (int by_call = 0; by_call < 2; by_call++) {
                uint64_t t = read_clock(clocks[c], by_call);
                /* Only the time of day may be set meanwhile. */
                CHECK(t >= last[c] || clocks[c] == CLOCK_REALTIME);
                last[c] = t;
            }
        usleep(200);
    }
    struct timespec used;
    unsigned cpu;
    CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used) == 0 && used.tv_sec < 60);
    CHECK(syscall(SYS_getcpu, &cpu, 0, 0) == 0 && time(0) > 1000000000);
    struct timeval day;
    CHECK(gettimeofday(&day, 0) == 0 && day.tv_sec - time(0) <= 1);
    verdict("PASS");
}
