/* Every resource limit, soft and hard. */
#include "oneshot.h"
#include <sys/resource.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    struct rlimit wanted[RLIM_NLIMITS], found;
    for (int i = 0; i < RLIM_NLIMITS; i++) {
        CHECK(getrlimit(i, &wanted[i]) == 0);
        if (i == RLIMIT_CPU || i == RLIMIT_AS || i == RLIMIT_DATA || i == RLIMIT_NPROC) continue;
        rlim_t most = wanted[i].rlim_max == RLIM_INFINITY ? 1 << 30 : wanted[i].rlim_max;
        wanted[i].rlim_max = most - most / 7;
        wanted[i].rlim_cur = wanted[i].rlim_max / 3;
        if (i == RLIMIT_NICE || i == RLIMIT_RTPRIO) wanted[i].rlim_cur = wanted[i].rlim_max = most / 2;
        CHECK(setrlimit(i, &wanted[i]) == 0);
    }
    ready();
    wait_for_term();
    for (int i = 0; i < RLIM_NLIMITS; i++) {
        CHECK(getrlimit(i, &found) == 0 && found.rlim_cur == wanted[i].rlim_cur);
        CHECK(found.rlim_max == wanted[i].rlim_max);
    }
    verdict("PASS");
}
