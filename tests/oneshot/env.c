/* Environment, arguments, working directory, umask, program, limits. */
#include "oneshot.h"
#include <sys/resource.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    char cwd[PATH_MAX], exe[PATH_MAX], later[PATH_MAX];
    char *slash = strrchr(strcpy(cwd, outfile), '/');
    *slash = 0;
    CHECK(chdir(cwd) == 0 && setenv("ONE_SHOT", "a value", 1) == 0);
    struct rlimit limit = {333, 444}, found;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    umask(0137);
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    CHECK(n > 0);
    pid_t pid = getpid(), sid = getsid(0), group = getpgrp();
    ready();
    wait_for_term();
    CHECK(getcwd(later, sizeof later) && !strcmp(later, cwd));
    CHECK(!strcmp(getenv("ONE_SHOT"), "a value") && !strcmp(argv[2], outfile));
    CHECK(getrlimit(RLIMIT_NOFILE, &found) == 0 && found.rlim_cur == 333 && found.rlim_max == 444);
    CHECK(umask(0) == 0137);
    CHECK(readlink("/proc/self/exe", later, sizeof later - 1) == n && !memcmp(exe, later, n));
    CHECK(getpid() == pid && getsid(0) == sid && sid == pid && getpgrp() == group);
    int fd = open("/proc/self/cmdline", O_RDONLY);
    CHECK(read(fd, later, sizeof later) > 0 && !strcmp(later, argv[0]));
    verdict("PASS");
}
