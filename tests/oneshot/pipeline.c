/* Processes at work on a stream: one makes it, two change it, the last one checks every byte. */
#include "oneshot.h"
static uint32_t next(uint32_t *state) { return *state = *state * 1664525 + 1013904223; }
int main(int argc, char **argv) {
    begin(argc, argv);
    int pipes[4][2];
    for (int i = 0; i < 4; i++) CHECK(pipe(pipes[i]) == 0);
    pid_t pids[3];
    for (int i = 0; i < 3; i++) {
        if ((pids[i] = fork())) continue;
        sigset_t none;
        sigemptyset(&none);
        if (i == 0) sigprocmask(SIG_SETMASK, &none, 0);
        uint32_t state = 1;
        for (;;) {
            unsigned char block[1000];
            if (i == 0) {
                if (told) break;
                for (int k = 0; k < 1000; k++) block[k] = next(&state) >> 24;
            } else {
                ssize_t n = read(pipes[i - 1][0], block, 1);
                if (n == 0) break;
                get(pipes[i - 1][0], block + 1, 999);
                if (block[0] != 0 || memcmp(block, "\0end", 4))
                    for (int k = 0; k < 1000; k++) block[k] ^= 0x5a;
            }
            put(pipes[i][1], block, 1000);
        }
        static const char end[1000] = "\0end";
        put(pipes[i][1], end, 1000);
        _exit(3);
    }
    uint32_t state = 1;
    sigset_t none;
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_SETMASK, &none, 0) == 0);
    for (long blocks = 0;; blocks++) {
        unsigned char block[1000];
        get(pipes[2][0], block, 1000);
        if (!memcmp(block, "\0end", 4) && told) break;
        for (int k = 0; k < 1000; k++) CHECK(block[k] == (unsigned char)(next(&state) >> 24));
        if (blocks == 100) ready();
        if (told) kill(pids[0], SIGTERM);
    }
    int status;
    CHECK(waitpid(pids[0], &status, 0) == pids[0] && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    for (int i = 1; i < 3; i++) kill(pids[i], SIGKILL), waitpid(pids[i], &status, 0);
    verdict("PASS");
}
