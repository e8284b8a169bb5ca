/* A daemon that writes lines to a log, with the time, as daemons do. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.lines", outfile);
    FILE *log = fopen(name, "w+");
    CHECK(log && dprintf(1, "it logs\n") > 0);
    sigset_t none;
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_SETMASK, &none, 0) == 0);
    long line = 0;
    for (; !told; line++) {
        CHECK(fprintf(log, "%ld %lld\n", line, (long long)now()) > 0);
        if (line == 10) ready();
        if (line % 7 == 0) CHECK(fflush(log) == 0);
        usleep(500);
    }
    CHECK(fflush(log) == 0);
    rewind(log);
    long long last = 0, time;
    for (long i = 0, n; i < line; i++) {
        CHECK(fscanf(log, "%ld %lld", &n, &time) == 2 && n == i && time > last);
        last = time;
    }
    verdict("PASS");
}
