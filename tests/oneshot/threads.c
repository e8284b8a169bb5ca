/* Threads at work: locks, conditions, thread-local storage, names, one that sleeps for long. */
#include "oneshot.h"
#include <sys/syscall.h>
#define COUNT 8
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static long at, rounds[COUNT];
static int over, tids[COUNT];
static __thread long own;
static void *work(void *arg) {
    long me = (long)arg;
    char name[16];
    snprintf(name, sizeof name, "worker-%ld", me);
    pthread_setname_np(pthread_self(), name);
    tids[me] = syscall(SYS_gettid);
    pthread_mutex_lock(&lock);
    while (!over) {
        while (at % COUNT != me && !over) pthread_cond_wait(&turn, &lock);
        at++, own++, rounds[me]++;
        pthread_cond_broadcast(&turn);
    }
    pthread_mutex_unlock(&lock);
    char found[16];
    pthread_getname_np(pthread_self(), found, sizeof found);
    CHECK(own == rounds[me] && !strcmp(name, found) && tids[me] == syscall(SYS_gettid));
    return (void *)me;
}
static void *sleeper(void *arg) {
    (void)arg;
    struct timespec t = {100000, 0};
    return nanosleep(&t, 0) ? "woken" : "slept";
}
int main(int argc, char **argv) {
    begin(argc, argv);
    pthread_t threads[COUNT], sleeping;
    for (long i = 0; i < COUNT; i++) CHECK(pthread_create(&threads[i], 0, work, (void *)i) == 0);
    CHECK(pthread_create(&sleeping, 0, sleeper, 0) == 0);
    for (;;) {
        pthread_mutex_lock(&lock);
        long done = at;
        pthread_mutex_unlock(&lock);
        if (done > 1000) break;
    }
    ready();
    wait_for_term();
    pthread_mutex_lock(&lock);
    long then = at;
    while (at < then + 1000) pthread_cond_wait(&turn, &lock);
    over = 1;
    pthread_cond_broadcast(&turn);
    pthread_mutex_unlock(&lock);
    for (long i = 0; i < COUNT; i++) {
        void *result;
        CHECK(pthread_join(threads[i], &result) == 0 && (long)result == i);
    }
    CHECK(pthread_tryjoin_np(sleeping, 0) == EBUSY);
    verdict("PASS");
}
