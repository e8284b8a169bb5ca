/* A chain of processes that pass a number around through pipes, and go on doing so. */
#include "oneshot.h"
#define COUNT 5
static volatile long passed;
int main(int argc, char **argv) {
    begin(argc, argv);
    int pipes[COUNT + 1][2];
    pid_t children[COUNT];
    for (int i = 0; i <= COUNT; i++) CHECK(pipe(pipes[i]) == 0);
    for (int i = 0; i < COUNT; i++)
        if (!(children[i] = fork())) {
            pid_t parent = getppid(), me = getpid();
            for (long n;;) {
                get(pipes[i][0], &n, sizeof n);
                if (n < 0) _exit(getppid() == parent && getpid() == me ? i + 10 : 99);
                n++;
                put(pipes[i + 1][1], &n, sizeof n);
            }
        }
    long n = 0;
    sigset_t none;
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_SETMASK, &none, 0) == 0);
    ready();
    for (long last = 0; !told; last = n) {
        put(pipes[0][1], &n, sizeof n);
        get(pipes[COUNT][0], &n, sizeof n);
        CHECK(n == last + COUNT);
    }
    for (int i = 0; i < COUNT; i++) {
        long end = -1;
        int status;
        put(pipes[i][1], &end, sizeof end);
        CHECK(waitpid(children[i], &status, 0) == children[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i + 10);
    }
    CHECK(wait(0) == -1 && errno == ECHILD);
    verdict("PASS");
}
