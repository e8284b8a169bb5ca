/* Interval timers: one that comes often, one that is far, those of processor time. */
#include "oneshot.h"
#include <sys/time.h>
static volatile sig_atomic_t alarms, profiles;
static void on_alarm(int signal) { signal == SIGALRM ? alarms++ : profiles++; }
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, 0);
    sigaction(SIGPROF, &action, 0);
    sigaction(SIGVTALRM, &action, 0);
    struct itimerval often = {{0, 7000}, {0, 7000}}, far = {{77, 0}, {5000, 0}}, found;
    struct itimerval some = {{0, 10000}, {0, 10000}};
    CHECK(setitimer(ITIMER_REAL, &often, 0) == 0 && setitimer(ITIMER_VIRTUAL, &far, 0) == 0);
    CHECK(setitimer(ITIMER_PROF, &some, 0) == 0);
    pid_t child = fork();
    if (!child) {
        alarm(4000);
        wait_for_term();
        unsigned left = alarm(0);
        _exit(left > 3000 && left <= 4000 ? 3 : 4);
    }
    ready();
    wait_for_term();
    CHECK(getitimer(ITIMER_REAL, &found) == 0 && found.it_interval.tv_usec == 7000);
    CHECK(getitimer(ITIMER_VIRTUAL, &found) == 0);
    CHECK(found.it_interval.tv_sec == 77 && found.it_value.tv_sec > 4000);
    CHECK(getitimer(ITIMER_PROF, &found) == 0 && found.it_interval.tv_usec == 10000);
    int before = alarms, profiled = profiles;
    uint64_t until = now() + 60000000000ull;
    while (alarms < before + 5 || profiles < profiled + 2) CHECK(now() < until);
    CHECK(setitimer(ITIMER_REAL, &(struct itimerval){0}, 0) == 0);
    CHECK(setitimer(ITIMER_PROF, &(struct itimerval){0}, 0) == 0);
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
