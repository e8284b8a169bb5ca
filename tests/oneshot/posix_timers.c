/* POSIX timers on several clocks, with gaps in their ids. */
#include "oneshot.h"
static volatile sig_atomic_t ticks, carried;
static void on_tick(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    ticks++;
    carried = info->si_value.sival_int;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction action = {.sa_sigaction = on_tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN + 3, &action, 0) == 0);
    timer_t timers[5];
    const clockid_t clocks[5] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME, CLOCK_MONOTONIC,
                                 CLOCK_PROCESS_CPUTIME_ID};
    for (int i = 0; i < 5; i++) {
        struct sigevent event = {.sigev_notify = i == 3 ? SIGEV_NONE : SIGEV_SIGNAL,
                                 .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 100 + i};
        CHECK(timer_create(clocks[i], &event, &timers[i]) == 0);
    }
    CHECK(timer_delete(timers[1]) == 0);
    struct itimerspec often = {{0, 5000000}, {0, 5000000}}, far = {{9, 0}, {8000, 0}}, found;
    CHECK(timer_settime(timers[0], 0, &often, 0) == 0);
    CHECK(timer_settime(timers[3], 0, &far, 0) == 0 && timer_settime(timers[4], 0, &far, 0) == 0);
    ready();
    wait_for_term();
    CHECK(timer_gettime(timers[0], &found) == 0 && found.it_interval.tv_nsec == 5000000);
    CHECK(timer_gettime(timers[1], &found) == -1 && errno == EINVAL);
    CHECK(timer_gettime(timers[2], &found) == 0 && !found.it_value.tv_sec && !found.it_value.tv_nsec);
    for (int i = 3; i < 5; i++) {
        CHECK(timer_gettime(timers[i], &found) == 0 && found.it_interval.tv_sec == 9);
        CHECK(found.it_value.tv_sec > 7000 && found.it_value.tv_sec <= 8000);
    }
    int before = ticks;
    uint64_t until = now() + 60000000000ull;
    while (ticks < before + 5) CHECK(now() < until);
    CHECK(carried == 100);
    verdict("PASS");
}
