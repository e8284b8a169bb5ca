/* Threads and processes that wait for locks; robust ones of a holder that ends after the restore. */
#include "oneshot.h"
#include <linux/futex.h>
#include <sys/syscall.h>
static pthread_mutex_t plain = PTHREAD_MUTEX_INITIALIZER;
static pthread_rwlock_t both = PTHREAD_RWLOCK_INITIALIZER;
static pthread_barrier_t barrier;
static struct shared {
    pthread_mutex_t robust, inherit;
    pthread_cond_t turn;
    int ready, passed;
    uint32_t word;
} *shared;
static void *locker(void *arg) {
    (void)arg;
    pthread_mutex_lock(&plain);
    pthread_mutex_unlock(&plain);
    pthread_rwlock_wrlock(&both);
    pthread_rwlock_unlock(&both);
    pthread_barrier_wait(&barrier);
    return arg;
}
static void *timed(void *arg) {
    (void)arg;
    struct timespec t = {2, 0};
    uint64_t from = now();
    long r = syscall(SYS_futex, &shared->word, FUTEX_WAIT, 0, &t, 0, 0);
    return r == -1 && errno == ETIMEDOUT && now() - from >= 2000000000ull ? "late" : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    pthread_mutexattr_t attributes;
    pthread_condattr_t condition;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    CHECK(pthread_mutex_init(&shared->robust, &attributes) == 0);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_STALLED);
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    CHECK(pthread_mutex_init(&shared->inherit, &attributes) == 0);
    pthread_condattr_init(&condition);
    pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED);
    CHECK(pthread_cond_init(&shared->turn, &condition) == 0);
    pthread_barrier_init(&barrier, 0, 4);
    pid_t child = fork();
    if (!child) {
        pthread_mutex_lock(&shared->robust);
        pthread_mutex_lock(&shared->inherit);
        shared->ready = 1;
        while (!shared->passed) pthread_cond_wait(&shared->turn, &shared->inherit);
        pthread_mutex_unlock(&shared->inherit);
        _exit(5);
    }
    while (!__atomic_load_n(&shared->ready, __ATOMIC_SEQ_CST)) usleep(1000);
    pthread_mutex_lock(&plain);
    pthread_rwlock_rdlock(&both);
    pthread_t threads[3], waiting;
    for (int i = 0; i < 3; i++) CHECK(pthread_create(&threads[i], 0, locker, shared) == 0);
    CHECK(pthread_create(&waiting, 0, timed, 0) == 0);
    ready();
    wait_for_term();
    CHECK(pthread_mutex_trylock(&shared->robust) == EBUSY && pthread_mutex_trylock(&plain) == EBUSY);
    pthread_mutex_unlock(&plain);
    pthread_rwlock_unlock(&both);
    pthread_barrier_wait(&barrier);
    void *result;
    for (int i = 0; i < 3; i++) CHECK(pthread_join(threads[i], &result) == 0 && result == shared);
    CHECK(pthread_join(waiting, &result) == 0 && result);
    pthread_mutex_lock(&shared->inherit);
    shared->passed = 1;
    pthread_cond_signal(&shared->turn);
    pthread_mutex_unlock(&shared->inherit);
    CHECK(pthread_mutex_lock(&shared->robust) == EOWNERDEAD);
    CHECK(pthread_mutex_consistent(&shared->robust) == 0);
    pthread_mutex_unlock(&shared->robust);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 5);
    verdict("PASS");
}
