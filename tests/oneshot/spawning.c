/* Processes and threads that come and go all the time. */
#include "oneshot.h"
#include <spawn.h>
#ifndef REST
#define REST 1000 /* microseconds between two of them */
#endif
static volatile int over;
static _Atomic long threads_done;
static void *brief(void *arg) { return (void *)((long)arg * 3); }
static void *starter(void *arg) {
    (void)arg;
    for (long i = 0; !over; i++) {
        pthread_t thread;
        void *result;
        CHECK(pthread_create(&thread, 0, brief, (void *)i) == 0);
        CHECK(pthread_join(thread, &result) == 0 && (long)result == i * 3);
        threads_done++;
        if (REST) usleep(REST);
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    pthread_t thread;
    CHECK(pthread_create(&thread, 0, starter, 0) == 0);
    sigset_t none;
    sigemptyset(&none);
    CHECK(pthread_sigmask(SIG_SETMASK, &none, 0) == 0);
    for (long i = 0; !told; i++) {
        int status;
        pid_t pid = fork();
        if (!pid) _exit(i % 100);
        while (waitpid(pid, &status, 0) != pid) CHECK(errno == EINTR);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i % 100);
        if (i % 10 == 0) {
            char *arguments[] = {"true", 0};
            CHECK(posix_spawn(&pid, "/bin/true", 0, 0, arguments, environ) == 0);
            while (waitpid(pid, &status, 0) != pid) CHECK(errno == EINTR);
            CHECK(status == 0);
        }
        if (i == 20) ready();
        if (REST) usleep(2 * REST);
    }
    over = 1;
    CHECK(pthread_join(thread, 0) == 0 && threads_done > 10);
    verdict("PASS");
}
