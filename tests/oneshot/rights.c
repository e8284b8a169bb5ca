/* Users, groups and capabilities of a process, of its children, and of a thread that differs. */
#include "oneshot.h"
#include <grp.h>
#include <linux/capability.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
static int report[2];
static void caps(uint32_t data[6]) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    CHECK(syscall(SYS_capget, &head, data) == 0);
}
static void set_caps(const uint32_t data[6]) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    CHECK(syscall(SYS_capset, &head, data) == 0);
}
static void say(void) {
    char byte = 0;
    put(report[1], &byte, 1);
}
static pid_t child(void (*become)(void), int (*check)(void)) {
    pid_t pid = fork();
    if (pid) return pid;
    become();
    say();
    told = 0;
    wait_for_term();
    _exit(check());
}
static void as_user(void) {
    gid_t groups[4] = {7, 77, 777, 7777};
    CHECK(setgroups(4, groups) == 0 && setresgid(1001, 1002, 1003) == 0);
    CHECK(setresuid(2001, 2002, 2003) == 0);
}
static int is_user(void) {
    uid_t u[3];
    gid_t g[3], groups[8];
    CHECK(getresuid(&u[0], &u[1], &u[2]) == 0 && getresgid(&g[0], &g[1], &g[2]) == 0);
    CHECK(u[0] == 2001 && u[1] == 2002 && u[2] == 2003 && g[0] == 1001 && g[1] == 1002 && g[2] == 1003);
    CHECK(getgroups(8, groups) == 4 && groups[0] == 7 && groups[3] == 7777);
    uint32_t data[6];
    caps(data);
    CHECK(!data[0] && !data[1] && !data[2] && setuid(0) == -1);
    return 3;
}
static uint32_t kept[6];
static void keep_few(void) {
    CHECK(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE) == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    uint32_t data[6] = {0};
    data[0] = 1 << CAP_NET_RAW;
    data[1] = 1 << CAP_NET_RAW | 1 << CAP_CHOWN | 1 << CAP_SETPCAP;
    data[2] = 1 << CAP_NET_RAW | 1 << CAP_CHOWN;
    CHECK(prctl(PR_SET_SECUREBITS, 1 << 0 | 1 << 2) == 0);
    CHECK(setfsuid(55) == 0);
    set_caps(data);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0) == 0);
    caps(kept);
}
static int has_few(void) {
    uint32_t data[6];
    caps(data);
    CHECK(!memcmp(data, kept, sizeof data) && prctl(PR_CAPBSET_READ, CAP_SYS_MODULE) == 0);
    CHECK(prctl(PR_CAPBSET_READ, CAP_CHOWN) == 1 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1);
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_RAW, 0, 0) == 1);
    CHECK(prctl(PR_GET_SECUREBITS) == (1 << 0 | 1 << 2) && setfsuid(-1) == 55);
    return 3;
}
static void *other(void *arg) {
    (void)arg;
    CHECK(syscall(SYS_setresuid, 0, 4001, 0) == 0);
    say();
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGUSR1);
    int got;
    sigwait(&term, &got);
    return geteuid() == 4001 && syscall(SYS_setresuid, 0, 0, 0) == 0 ? arg : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0);
    pid_t pids[2] = {child(as_user, is_user), child(keep_few, has_few)};
    sigset_t usr;
    sigemptyset(&usr);
    sigaddset(&usr, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr, 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, 0, other, report) == 0);
    char bytes[3];
    get(report[0], bytes, 3);
    ready();
    wait_for_term();
    for (int i = 0; i < 2; i++) {
        int status;
        CHECK(kill(pids[i], SIGTERM) == 0 && waitpid(pids[i], &status, 0) == pids[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    }
    void *result;
    CHECK(geteuid() == 0 && pthread_kill(thread, SIGUSR1) == 0);
    CHECK(pthread_join(thread, &result) == 0 && result);
    verdict("PASS");
}
