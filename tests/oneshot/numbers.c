/* Very many descriptors with gaps, shared between processes, some closed by exec. */
#include "oneshot.h"
#include <sys/resource.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    int most = limit.rlim_max < 4000 ? (int)limit.rlim_max : 4000;
    limit.rlim_cur = most;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    char name[PATH_MAX], text[8];
    snprintf(name, sizeof name, "%s.numbers", outfile);
    int file = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600), pipes[2];
    put(file, "0123456789", 10);
    CHECK(pipe(pipes) == 0 && lseek(file, 0, SEEK_SET) == 0);
    for (int i = 0; i < 600; i++) {
        int number = 20 + i * 5 % (most - 30);
        CHECK(dup3(i % 2 ? file : pipes[i / 2 % 2], number, i % 3 ? 0 : O_CLOEXEC) == number);
    }
    pid_t child = fork();
    if (!child) {
        wait_for_term();
        get(25, text, 2);
        _exit(text[0] == '0' && text[1] == '1' ? 3 : 4);
    }
    ready();
    wait_for_term();
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    get(file, text, 1);
    CHECK(text[0] == '2');
    for (int i = 0; i < 600; i++) {
        int number = 20 + i * 5 % (most - 30);
        CHECK(fcntl(number, F_GETFD) == (i % 3 ? 0 : FD_CLOEXEC));
        if (i % 2) CHECK(lseek(number, 0, SEEK_CUR) == 3);
    }
    put(30, "pipe", 4);
    get(20, text, 4);
    CHECK(!memcmp(text, "pipe", 4) && fcntl(21, F_GETFD) == -1);
    verdict("PASS");
}
