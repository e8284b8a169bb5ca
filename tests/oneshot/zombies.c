/* Children that have ended and are not waited for, by exit and by signal; one that is stopped. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    pid_t pids[3], stopped;
    siginfo_t info;
    for (int i = 0; i < 3; i++) {
        if (!(pids[i] = fork())) {
            if (i == 2) kill(getpid(), SIGKILL);
            _exit(40 + i);
        }
        CHECK(waitid(P_PID, pids[i], &info, WEXITED | WNOWAIT) == 0);
    }
    if (!(stopped = fork())) {
        raise(SIGSTOP);
        _exit(9);
    }
    CHECK(waitid(P_PID, stopped, &info, WSTOPPED) == 0);
    ready();
    wait_for_term();
    int status;
    for (int i = 2; i >= 0; i--) {
        CHECK(waitid(P_PID, pids[i], &info, WEXITED | WNOWAIT) == 0 && info.si_pid == pids[i]);
        CHECK(waitpid(pids[i], &status, WNOHANG) == pids[i]);
        if (i == 2) CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        else CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 40 + i);
    }
    CHECK(waitpid(stopped, &status, WNOHANG) == 0 && kill(stopped, SIGCONT) == 0);
    CHECK(waitpid(stopped, &status, 0) == stopped && WIFEXITED(status) && WEXITSTATUS(status) == 9);
    verdict("PASS");
}
