/* Watches of files and directories, with gaps in their numbers. */
#include "oneshot.h"
#include <sys/inotify.h>
static char base[PATH_MAX];
static char *at(const char *name) {
    static char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s.inotify/%s", base, name);
    return path;
}
static void make(const char *name) { close(open(at(name), O_CREAT | O_WRONLY, 0600)); }
int main(int argc, char **argv) {
    begin(argc, argv);
    strcpy(base, outfile);
    CHECK((mkdir(at(""), 0700) == 0 || errno == EEXIST));
    unlink(at("born"));
    make("a"), make("b"), make("c");
    int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    int dir = inotify_add_watch(fd, at(""), IN_CREATE | IN_DELETE);
    int a = inotify_add_watch(fd, at("a"), IN_MODIFY), b = inotify_add_watch(fd, at("b"), IN_MODIFY);
    int c = inotify_add_watch(fd, at("c"), IN_ATTRIB | IN_ONESHOT);
    CHECK(dir > 0 && a > 0 && b > 0 && c > 0 && inotify_rm_watch(fd, a) == 0);
    char buffer[4096] __attribute__((aligned(8)));
    CHECK(read(fd, buffer, sizeof buffer) > 0);
    ready();
    wait_for_term();
    CHECK(read(fd, buffer, sizeof buffer) == -1 && errno == EAGAIN);
    int file = open(at("b"), O_WRONLY);
    put(file, "x", 1);
    make("born");
    CHECK(chmod(at("c"), 0640) == 0);
    const struct { int watch; uint32_t mask; const char *name; } wanted[] = {
        {b, IN_MODIFY, ""}, {dir, IN_CREATE, "born"}, {c, IN_ATTRIB, ""}, {c, IN_IGNORED, ""}};
    ssize_t n = read(fd, buffer, sizeof buffer);
    char *p = buffer;
    for (int i = 0; i < 4; i++) {
        struct inotify_event *event = (void *)p;
        CHECK(p < buffer + n && event->wd == wanted[i].watch && event->mask == wanted[i].mask);
        CHECK(!strcmp(event->len ? event->name : "", wanted[i].name));
        p += sizeof *event + event->len;
    }
    CHECK(p == buffer + n && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(inotify_add_watch(fd, at("a"), IN_MODIFY) > c);
    verdict("PASS");
}
