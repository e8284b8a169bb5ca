/* A main thread that is in vfork most of the time: it stands still until its child goes on. */
#include "oneshot.h"
#include <sys/syscall.h>
static void *other(void *arg) {
    while (!*(volatile int *)arg) usleep(1000);
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    pthread_t thread;
    static volatile int over;
    CHECK(pthread_create(&thread, 0, other, (void *)&over) == 0);
    sigset_t none;
    sigemptyset(&none);
    CHECK(pthread_sigmask(SIG_SETMASK, &none, 0) == 0);
    for (int i = 0; !told; i++) {
        int status;
        pid_t pid = vfork();
        if (!pid) {
            struct timespec pause = {0, 200000000};
            syscall(SYS_nanosleep, &pause, 0);
            _exit(i % 100);
        }
        CHECK(pid > 0);
        while (waitpid(pid, &status, 0) != pid) CHECK(errno == EINTR);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == i % 100);
        if (i == 0) ready();
        usleep(100000);
    }
    over = 1;
    CHECK(pthread_join(thread, 0) == 0);
    verdict("PASS");
}
