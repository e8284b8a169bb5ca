/* Filters of system calls: of a process, one above the other, shared by threads, of one thread. */
#include "oneshot.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#define ERRNO(e) (SECCOMP_RET_ERRNO | (e))
static int report[2];
/* Adds a filter that answers one call in its way. */
static int answer(long number, uint32_t action, unsigned flags) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}
static int fails_with(long number, int error) {
    errno = 0;
    return syscall(number) == -1 && errno == error;
}
static void say(void) {
    char byte = 0;
    put(report[1], &byte, 1);
}
/* How many filters this thread has, by the kernel's own count. */
static int filters(void) {
    char line[256];
    int mode = -1, count = -1;
    FILE *status = fopen("/proc/thread-self/status", "r");
    CHECK(status);
    while (fgets(line, sizeof line, status)) {
        sscanf(line, "Seccomp: %d", &mode);
        sscanf(line, "Seccomp_filters: %d", &count);
    }
    fclose(status);
    CHECK(mode == (count ? SECCOMP_MODE_FILTER : 0));
    return count;
}
static pid_t child(void (*become)(void), void (*check)(void)) {
    pid_t pid = fork();
    if (pid) return pid;
    become();
    say();
    told = 0;
    wait_for_term();
    check();
    _exit(3);
}
/* What a capture asks a process for would be the end of it, if it were not kept from the filter. */
static void stack_them(void) {
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(setresgid(1500, 1500, 1500) == 0 && setresuid(1500, 1500, 1500) == 0);
    CHECK(answer(SYS_getppid, ERRNO(77), SECCOMP_FILTER_FLAG_LOG) == 0);
    CHECK(answer(SYS_sigaltstack, SECCOMP_RET_KILL_PROCESS, 0) == 0);
    CHECK(answer(SYS_getppid, ERRNO(78), 0) == 0);
    CHECK(answer(SYS_getpgrp, SECCOMP_RET_TRAP, 0) == 0);
}
static volatile sig_atomic_t trapped;
static void on_trap(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    trapped = info->si_syscall;
}
static void are_stacked(void) {
    /* Of those that are equally strict the newest wins. */
    CHECK(filters() == 4 && fails_with(SYS_getppid, 78) && syscall(SYS_getpid) == getpid());
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSYS, &action, 0) == 0);
    syscall(SYS_getpgrp);
    CHECK(trapped == SYS_getpgrp && prctl(PR_GET_SECCOMP) == SECCOMP_MODE_FILTER);
    int status;
    pid_t heir = fork();
    if (!heir) {
        syscall(SYS_sigaltstack, 0, 0);
        _exit(0);
    }
    CHECK(waitpid(heir, &status, 0) == heir && WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
}
static pthread_t others[2];
static volatile sig_atomic_t alone;
static void *other(void *arg) {
    if (arg == &alone) CHECK(answer(SYS_getpgrp, ERRNO(79), 0) == 0);
    say();
    sigset_t usr;
    sigemptyset(&usr);
    sigaddset(&usr, SIGUSR1);
    int got;
    sigwait(&usr, &got);
    int own = fails_with(SYS_getpgrp, 79);
    return fails_with(SYS_getppid, 77) && own == (arg == &alone) ? arg : 0;
}
static void block_usr(void) {
    sigset_t usr;
    sigemptyset(&usr);
    sigaddset(&usr, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr, 0);
}
static void join(int thread, const void *wanted) {
    void *result;
    CHECK(pthread_kill(others[thread], SIGUSR1) == 0 && pthread_join(others[thread], &result) == 0);
    CHECK(result == wanted);
}
static void share_it(void) {
    block_usr();
    CHECK(pthread_create(&others[0], 0, other, report) == 0);
    CHECK(answer(SYS_getppid, ERRNO(77), SECCOMP_FILTER_FLAG_TSYNC) == 0);
}
static void is_shared(void) {
    /* What they have in common is one filter still: the next can be for both. */
    CHECK(answer(SYS_getsid, ERRNO(80), SECCOMP_FILTER_FLAG_TSYNC) == 0 && filters() == 2);
    CHECK(fails_with(SYS_getsid, 80) && fails_with(SYS_getppid, 77));
    join(0, report);
}
static void one_alone(void) {
    block_usr();
    CHECK(answer(SYS_getppid, ERRNO(77), 0) == 0);
    CHECK(pthread_create(&others[0], 0, other, (void *)&alone) == 0);
    CHECK(pthread_create(&others[1], 0, other, report) == 0);
}
static void is_alone(void) {
    CHECK(filters() == 1 && fails_with(SYS_getppid, 77) && syscall(SYS_getpgrp) > 0);
    /* One of the threads has a filter more: what is for all cannot be. */
    CHECK(answer(SYS_getsid, ERRNO(80), SECCOMP_FILTER_FLAG_TSYNC) != 0);
    join(0, (void *)&alone);
    join(1, report);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0);
    pid_t pids[3] = {child(stack_them, are_stacked), child(share_it, is_shared), child(one_alone, is_alone)};
    char bytes[6];
    get(report[0], bytes, 6);
    ready();
    wait_for_term();
    CHECK(filters() == 0);
    for (int i = 0; i < 3; i++) {
        int status;
        CHECK(kill(pids[i], SIGTERM) == 0 && waitpid(pids[i], &status, 0) == pids[i]);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 3) FAIL("child %d: status %#x", i, status);
    }
    verdict("PASS");
}
