/* Stacks: one that grows on, threads with guard pages, alternate stacks that catch faults. */
#include "oneshot.h"
#include <setjmp.h>
static __thread sigjmp_buf back;
static __thread char *own;
static __thread volatile int on_own;
static void on_fault(int signal) {
    (void)signal;
    char here;
    on_own = &here > own && &here < own + 65536;
    siglongjmp(back, 1);
}
static void use_own(void) {
    own = malloc(65536);
    stack_t stack = {.ss_sp = own, .ss_size = 65536};
    CHECK(sigaltstack(&stack, 0) == 0);
}
static int fault(volatile char *where) {
    if (!sigsetjmp(back, 1)) {
        *where = 1;
        return 0;
    }
    return on_own;
}
static int deep(int level) {
    volatile char pad[16384];
    memset((char *)pad, level, sizeof pad);
    return level ? deep(level - 1) + (pad[9] == (char)level) : 0;
}
static pthread_barrier_t set, go;
static void *worker(void *arg) {
    use_own();
    pthread_attr_t attributes;
    void *stack;
    size_t size, guard;
    CHECK(pthread_getattr_np(pthread_self(), &attributes) == 0);
    CHECK(pthread_attr_getstack(&attributes, &stack, &size) == 0);
    CHECK(pthread_attr_getguardsize(&attributes, &guard) == 0 && guard >= 4096);
    pthread_barrier_wait(&set);
    pthread_barrier_wait(&go);
    CHECK(deep(100) == 100);
    /* The guard lies below the stack, in some releases as a part of what they call its size. */
    return fault((char *)stack - 1) || fault((char *)stack) ? arg : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_ONSTACK};
    CHECK(sigaction(SIGSEGV, &action, 0) == 0);
    use_own();
    pthread_barrier_init(&set, 0, 3);
    pthread_barrier_init(&go, 0, 3);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], 0, worker, &go) == 0);
    pthread_barrier_wait(&set);
    ready();
    wait_for_term();
    /* Beyond what the stack was at the checkpoint. */
    CHECK(deep(300) == 300);
    CHECK(fault((char *)16) == 1);
    pthread_barrier_wait(&go);
    for (int i = 0; i < 2; i++) {
        void *result;
        CHECK(pthread_join(threads[i], &result) == 0 && result);
    }
    verdict("PASS");
}
