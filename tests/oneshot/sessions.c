/* Sessions and process groups within a tree. */
#include "oneshot.h"
static int report[2];
static pid_t child(int group, int session) {
    pid_t pid = fork();
    if (pid) return pid;
    if (session) setsid();
    else if (group) setpgid(0, 0);
    int own[3] = {getpid(), getpgrp(), getsid(0)};
    put(report[1], own, sizeof own);
    told = 0;
    wait_for_term();
    _exit(getpid() == own[0] && getpgrp() == own[1] && getsid(0) == own[2] ? 3 : 4);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0);
    pid_t pids[3] = {child(0, 0), child(1, 0), child(0, 1)};
    int seen[3][3];
    for (int i = 0; i < 3; i++) get(report[0], seen[i], sizeof seen[i]);
    ready();
    wait_for_term();
    CHECK(getsid(pids[0]) == getpid() && getpgid(pids[0]) == getpid());
    CHECK(getsid(pids[1]) == getpid() && getpgid(pids[1]) == pids[1]);
    CHECK(getsid(pids[2]) == pids[2] && getpgid(pids[2]) == pids[2]);
    for (int i = 0; i < 3; i++) {
        int status;
        CHECK(kill(pids[i], SIGTERM) == 0 && waitpid(pids[i], &status, 0) == pids[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    }
    verdict("PASS");
}
