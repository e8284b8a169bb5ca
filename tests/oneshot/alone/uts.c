/* A host name and a domain name of its own (a uts namespace). */
#include "../oneshot.h"
#include <sched.h>
#include <sys/utsname.h>
static int is_named(const char *host, const char *domain) {
    struct utsname names;
    CHECK(uname(&names) == 0);
    return !strcmp(names.nodename, host) && !strcmp(names.domainname, domain);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct stat outer, own, now_own;
    CHECK(stat("/proc/self/ns/uts", &outer) == 0 && unshare(CLONE_NEWUTS) == 0);
    CHECK(stat("/proc/self/ns/uts", &own) == 0 && own.st_ino != outer.st_ino);
    CHECK(sethostname("a-name-of-its-own", 17) == 0 && setdomainname("its.domain", 10) == 0);
    pid_t child = fork();
    if (!child) {
        told = 0;
        wait_for_term();
        _exit(is_named("another-name", "its.domain") ? 3 : 4);
    }
    ready();
    wait_for_term();
    CHECK(is_named("a-name-of-its-own", "its.domain"));
    /* It is theirs together, and nobody else's. */
    int status;
    CHECK(sethostname("another-name", 12) == 0 && kill(child, SIGTERM) == 0);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(stat("/proc/self/ns/uts", &now_own) == 0 && now_own.st_ino != outer.st_ino);
    verdict("PASS");
}
