/* A tree of all the other programs of this directory at once, as children of one process. */
#include "../oneshot.h"
#include <dirent.h>
#include <sys/prctl.h>
#define MOST 100
static struct {
    char *name, *out, *pidfile;
    pid_t pid;
} all[MOST];
static int count;
static char *join(const char *a, const char *b, const char *c) {
    char *text;
    CHECK(asprintf(&text, "%s%s%s", a, b, c) > 0);
    return text;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    char directory[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", directory, sizeof directory - 1);
    CHECK(n > 0);
    directory[n] = 0;
    char *own = strrchr(directory, '/');
    *own++ = 0;
    CHECK(setenv("ONE_SHOT_CHILD", "1", 1) == 0);
    DIR *list = opendir(directory);
    for (struct dirent *entry; (entry = readdir(list)) && count < MOST;)
        if (!strchr(entry->d_name, '.') && strcmp(entry->d_name, own))
            all[count++].name = strdup(entry->d_name);
    closedir(list);
    /* One of them leaves an orphan, whose leader nobody waits for. */
    CHECK(count > 1 && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
    signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < count; i++) {
        char *base = join(directory, "/", all[i].name);
        all[i].out = join(base, ".all", "");
        all[i].pidfile = join(base, ".allpid", "");
        unlink(all[i].out);
        unlink(all[i].pidfile);
        if (!(all[i].pid = fork())) {
            sigset_t none;
            sigemptyset(&none);
            sigprocmask(SIG_SETMASK, &none, 0);
            signal(SIGCHLD, SIG_DFL);
            execl(base, base, all[i].pidfile, all[i].out, (char *)0);
            _exit(99);
        }
    }
    for (int i = 0; i < count; i++)
        for (uint64_t until = now() + 60000000000ull; access(all[i].pidfile, F_OK); usleep(5000)) {
            CHECK(now() < until);
            if (access(all[i].out, F_OK) == 0) FAIL("%s does not start", all[i].name);
        }
    ready();
    wait_for_term();
    /* Some have ended and left another process behind, which their pidfile names. */
    for (int i = 0; i < count; i++) {
        char text[16] = "";
        int fd = open(all[i].pidfile, O_RDONLY);
        CHECK(read(fd, text, sizeof text - 1) > 0 && kill(atoi(text), SIGTERM) == 0);
        close(fd);
    }
    char *failed = "";
    for (int i = 0; i < count; i++) {
        char text[200] = "";
        for (uint64_t until = now() + 120000000000ull; access(all[i].out, F_OK); usleep(5000))
            if (now() > until) FAIL("%s says nothing", all[i].name);
        int fd = open(all[i].out, O_RDONLY);
        CHECK(read(fd, text, sizeof text - 1) > 0);
        close(fd);
        if (strcmp(text, "PASS\n")) failed = join(failed, all[i].name, join(": ", text, ""));
    }
    if (*failed) FAIL("%s", failed);
    verdict("PASS");
}
