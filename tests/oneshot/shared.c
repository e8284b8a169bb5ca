/* Memory that processes share: written by one, read by the other, before and after. */
#include "oneshot.h"
#include <stdatomic.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    const size_t size = 1 << 20;
    unsigned char *a = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(a != MAP_FAILED);
    for (size_t i = 4096; i < size; i++) a[i] = i * 13 >> 4;
    _Atomic long *words = (void *)a;
    pid_t child = fork();
    if (!child) {
        for (;;) {
            long n = words[0];
            if (n == -1) _exit(7);
            if (words[1] != n) words[1] = n;
            usleep(200);
        }
    }
    ready();
    wait_for_term();
    for (size_t i = 4096; i < size; i++) CHECK(a[i] == (unsigned char)(i * 13 >> 4));
    for (long n = 1; n < 20; n++) {
        words[0] = n;
        uint64_t until = now() + 60000000000ull;
        while (words[1] != n) CHECK(now() < until);
    }
    int status;
    words[0] = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    verdict("PASS");
}
