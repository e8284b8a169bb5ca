/* What prctl(2) and personality(2) set. */
#include "oneshot.h"
#include <sys/personality.h>
#include <sys/prctl.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(prctl(PR_SET_NAME, "a new name", 0, 0, 0) == 0 && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0 && prctl(PR_SET_TIMERSLACK, 77777, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0 && personality(ADDR_NO_RANDOMIZE) >= 0);
    int started[2];
    CHECK(pipe(started) == 0);
    pid_t child = fork();
    if (!child) {
        CHECK(prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0) == 0);
        pid_t grandchild = fork();
        if (!grandchild) {
            char byte;
            told = 0;
            put(started[1], "x", 1);
            wait_for_term();
            put(started[1], "x", 1);
            get(started[0], &byte, 0);
            _exit(getppid() == 1 ? 4 : 3);
        }
        put(started[1], "x", 1);
        for (;;) pause();
    }
    char text[16];
    get(started[0], text, 2);
    ready();
    wait_for_term();
    CHECK(prctl(PR_GET_NAME, text, 0, 0, 0) == 0 && !strcmp(text, "a new name"));
    CHECK(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0 && prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0) == 77777);
    CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1 && personality(0xffffffff) == ADDR_NO_RANDOMIZE);
    int reaper = 0, status;
    CHECK(prctl(PR_GET_CHILD_SUBREAPER, &reaper, 0, 0, 0) == 0 && reaper == 1);
    /* Its orphan comes to us. */
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child);
    char children[100] = "";
    int fd = open("/proc/thread-self/children", O_RDONLY);
    CHECK(read(fd, children, sizeof children - 1) > 0);
    pid_t orphan = atoi(children);
    CHECK(kill(orphan, SIGTERM) == 0 && waitpid(orphan, &status, 0) == orphan);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
