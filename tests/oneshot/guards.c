/* Guard regions: pages that nobody may touch, without a mapping of their own. */
#include "oneshot.h"
#include <setjmp.h>
#include <sys/uio.h>
#define PAGE 4096
#define INSTALL 102
#define REMOVE 103
static int report[2], probe[2];
static char *few, *many, *locked, *hidden, *mine;
static char *memory(int pages) {
    char *at = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    for (int i = 0; i < pages; i++) sprintf(at + i * PAGE, "page %d", i);
    return at;
}
static void guard(char *at, int first, int count) {
    CHECK(madvise(at + first * PAGE, count * PAGE, INSTALL) == 0);
}
/* The kernel cannot read it for us either. */
static int is_guarded(const char *at, int page) {
    char byte;
    if (write(probe[1], at + page * PAGE, 1) == 1) {
        get(probe[0], &byte, 1);
        return 0;
    }
    CHECK(errno == EFAULT);
    return 1;
}
/* These pages and no others are guards; the rest is as it was. */
static void expect(const char *at, int pages, int (*guarded)(int)) {
    for (int i = 0; i < pages; i++) {
        char text[32];
        sprintf(text, "page %d", i);
        if (is_guarded(at, i) != guarded(i)) FAIL("page %d: guarded %d", i, !guarded(i));
        if (!guarded(i)) CHECK(!strcmp(at + i * PAGE, text));
    }
}
static int in_few(int page) { return page >= 4 && page < 8; }
static int in_many(int page) { return page % 2 == 0; }
static int in_locked(int page) { return page == 1; }
static int in_hidden(int page) { return page == 3 || page == 4; }
static int in_mine(int page) { return page == 2; }
static sigjmp_buf back;
static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    siglongjmp(back, info->si_addr == few + 5 * PAGE ? 1 : 2);
}
static void check(void) {
    expect(few, 16, in_few);
    expect(many, 600, in_many);
    expect(locked, 4, in_locked);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSEGV, &action, 0) == 0);
    int how = sigsetjmp(back, 1);
    if (!how) few[5 * PAGE] = 'x';
    CHECK(how == 1);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0 && pipe(probe) == 0);
    few = memory(16), many = memory(600), locked = memory(4), hidden = memory(8);
    if (madvise(few, PAGE, INSTALL) != 0) {
        /* A kernel without them: there is nothing to lose. */
        ready();
        wait_for_term();
        verdict("PASS");
    }
    CHECK(madvise(few, PAGE, REMOVE) == 0 && !few[0]);
    strcpy(few, "page 0");
    guard(few, 4, 4);
    for (int i = 0; i < 600; i += 2) guard(many, i, 1);
    CHECK(madvise(locked + PAGE, PAGE, INSTALL) == 0);
    CHECK(syscall(325, locked, 4 * PAGE, 1) == 0); /* mlock2, MLOCK_ONFAULT */
    guard(hidden, 3, 2);
    CHECK(mprotect(hidden, 8 * PAGE, PROT_NONE) == 0);
    pid_t child = fork();
    if (!child) {
        mine = memory(4);
        guard(mine, 2, 1);
        put(report[1], "r", 1);
        told = 0;
        wait_for_term();
        expect(mine, 4, in_mine);
        check();
        _exit(3);
    }
    char byte;
    get(report[0], &byte, 1);
    ready();
    wait_for_term();
    check();
    CHECK(mprotect(hidden, 8 * PAGE, PROT_READ | PROT_WRITE) == 0);
    expect(hidden, 8, in_hidden);
    /* What a guard took away is gone, and what it left is there. */
    CHECK(madvise(few + 4 * PAGE, 4 * PAGE, REMOVE) == 0 && !few[4 * PAGE] && !few[7 * PAGE]);
    few[5 * PAGE] = 'x';
    CHECK(!strcmp(few + 3 * PAGE, "page 3") && !strcmp(few + 8 * PAGE, "page 8"));
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
