/* Nice values, policies, affinity and input and output priority of threads. */
#include "oneshot.h"
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
static pthread_barrier_t set, checked;
static void *worker(void *arg) {
    (void)arg;
    cpu_set_t one, found;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0}) == 0);
    CHECK(setpriority(PRIO_PROCESS, syscall(SYS_gettid), 9) == 0);
    pthread_barrier_wait(&set);
    pthread_barrier_wait(&checked);
    CHECK(sched_getaffinity(0, sizeof found, &found) == 0 && CPU_EQUAL(&found, &one));
    CHECK(sched_getscheduler(0) == SCHED_BATCH);
    CHECK(getpriority(PRIO_PROCESS, syscall(SYS_gettid)) == 9);
    return arg;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    pthread_barrier_init(&set, 0, 2);
    pthread_barrier_init(&checked, 0, 2);
    const int class_be_6 = 2 << 13 | 6;
    CHECK(setpriority(PRIO_PROCESS, 0, 5) == 0 && syscall(SYS_ioprio_set, 1, 0, class_be_6) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, 0, worker, 0) == 0);
    pthread_barrier_wait(&set);
    int started[2];
    char byte, score[8] = "";
    CHECK(pipe(started) == 0);
    pid_t child = fork();
    if (!child) {
        CHECK(sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0}) == 0);
        put(started[1], "x", 1);
        wait_for_term();
        _exit(sched_getscheduler(0) == SCHED_IDLE ? 3 : 4);
    }
    get(started[0], &byte, 1);
    int fd = open("/proc/self/oom_score_adj", O_RDWR);
    put(fd, "321", 3);
    ready();
    wait_for_term();
    CHECK(getpriority(PRIO_PROCESS, 0) == 5 && syscall(SYS_ioprio_get, 1, 0) == class_be_6);
    fd = open("/proc/self/oom_score_adj", O_RDONLY);
    CHECK(read(fd, score, 7) > 0 && atoi(score) == 321);
    pthread_barrier_wait(&checked);
    pthread_join(thread, 0);
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
