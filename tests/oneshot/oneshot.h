/* What the programs of the one-shot tests share.
 *
 * Contract: `program PIDFILE OUTFILE [ARGUMENT ...]` becomes a daemon, sets its state up, writes
 * PIDFILE (under another name first), and waits for SIGTERM. Then it checks everything and writes
 * PASS, or FAIL and why, into OUTFILE. With ONE_SHOT_CHILD in its environment it stays a child of
 * who started it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *pidfile, *outfile;
static volatile sig_atomic_t told;

static void on_term(int signal) { (void)signal; told = 1; }

static void verdict(const char *format, ...) {
    char name[PATH_MAX], text[1024];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(text, sizeof text - 1, format, list);
    va_end(list);
    text[n++] = '\n';
    snprintf(name, sizeof name, "%s.part", outfile);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, n) != n || rename(name, outfile)) abort();
    _exit(strncmp(text, "PASS", 4) ? 1 : 0);
}

#define FAIL(...) verdict("FAIL " __VA_ARGS__)
#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) FAIL("%s:%d: %s (errno %d)", __FILE__, __LINE__, #condition, errno);  \
    } while (0)

static void redirect(void) {
    char name[PATH_MAX];
    int null = open("/dev/null", O_RDWR);
    snprintf(name, sizeof name, "%s.log", outfile);
    int log = open(name, O_WRONLY | O_CREAT | O_APPEND, 0644);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    if (null > 2) close(null);
    if (log > 2) close(log);
}

/* Becomes a daemon that leads a session of its own. */
static void begin(int argc, char **argv) {
    if (argc < 3) exit(2);
    pidfile = argv[1];
    outfile = argv[2];
    if (!getenv("ONE_SHOT_CHILD") && fork()) _exit(0);
    setsid();
    closefrom(3);
    redirect();
    struct sigaction action = {.sa_handler = on_term, .sa_flags = SA_RESTART};
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    CHECK(sigaction(SIGTERM, &action, 0) == 0 && sigprocmask(SIG_BLOCK, &term, 0) == 0);
}

static void ready(void) {
    char name[PATH_MAX], text[16];
    snprintf(name, sizeof name, "%s.part", pidfile);
    int n = snprintf(text, sizeof text, "%d\n", getpid());
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    CHECK(fd >= 0 && write(fd, text, n) == n && close(fd) == 0 && rename(name, pidfile) == 0);
}

/* Sleeps until SIGTERM comes, whenever that is. It is blocked but here. */
static inline void wait_for_term(void) {
    sigset_t open;
    CHECK(sigprocmask(0, 0, &open) == 0);
    sigdelset(&open, SIGTERM);
    while (!told) sigsuspend(&open);
}

static inline uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Writes all, reads all. */
static inline void put(int fd, const void *bytes, size_t n) {
    for (ssize_t w; n; n -= w, bytes = (const char *)bytes + w)
        CHECK((w = write(fd, bytes, n)) > 0);
}
static inline void get(int fd, void *bytes, size_t n) {
    for (ssize_t r; n; n -= r, bytes = (char *)bytes + r) CHECK((r = read(fd, bytes, n)) > 0);
}
