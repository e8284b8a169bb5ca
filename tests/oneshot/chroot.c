/* A child with a root directory of its own, and a working directory within it. */
#include "oneshot.h"
#include <sys/syscall.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    char root[PATH_MAX], inside[PATH_MAX + 8], text[PATH_MAX];
    snprintf(root, sizeof root, "%s.root", outfile);
    snprintf(inside, sizeof inside, "%s/sub", root);
    CHECK((mkdir(root, 0755) == 0 || errno == EEXIST) && (mkdir(inside, 0755) == 0 || errno == EEXIST));
    int started[2];
    CHECK(pipe(started) == 0);
    pid_t child = fork();
    if (!child) {
        CHECK(chroot(root) == 0 && chdir("/sub") == 0);
        umask(027);
        int fd = open("a file", O_RDWR | O_CREAT, 0666);
        put(fd, "inside", 6);
        put(started[1], "x", 1);
        wait_for_term();
        CHECK(syscall(SYS_getcwd, text, sizeof text) > 0 && !strcmp(text, "/sub"));
        CHECK(lseek(fd, 0, SEEK_SET) == 0);
        get(fd, text, 6);
        struct stat of;
        CHECK(stat("/sub/a file", &of) == 0 && (of.st_mode & 0777) == 0640);
        CHECK(access("/proc", F_OK) == -1 && access("/sub/../../sub", F_OK) == 0 && umask(0) == 027);
        _exit(3);
    }
    get(started[0], text, 1);
    ready();
    wait_for_term();
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3 && access("/proc/self", F_OK) == 0);
    verdict("PASS");
}
