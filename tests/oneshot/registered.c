/* What threads have told the kernel: restartable sequences, robust lists, membarrier. */
#include "oneshot.h"
#include <linux/membarrier.h>
#include <linux/rseq.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
static int barrier(int command) { return syscall(SYS_membarrier, command, 0, 0); }
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) == 0);
    void *head, *head_later;
    size_t length, later;
    CHECK(syscall(SYS_get_robust_list, 0, &head, &length) == 0 && head);
    struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    CHECK(__rseq_size == 0 || (int)area->cpu_id >= 0);
    ready();
    wait_for_term();
    CHECK(barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0);
    CHECK(syscall(SYS_get_robust_list, 0, &head_later, &later) == 0);
    CHECK(head == head_later && length == later);
    if (__rseq_size) {
        /* Registered still: under another address it cannot be registered. */
        static struct rseq other __attribute__((aligned(32)));
        CHECK(syscall(SYS_rseq, &other, sizeof other, 0, 0x53053053) == -1 && errno != ENOSYS);
        unsigned cpu;
        for (int i = 0; i < 1000; i++) {
            CHECK(syscall(SYS_getcpu, &cpu, 0, 0) == 0);
            if (area->cpu_id == cpu) verdict("PASS");
        }
        FAIL("the area does not say where it runs");
    }
    verdict("PASS");
}
