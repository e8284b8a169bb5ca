/* Dispositions, masks, signals that wait with their values, the alternate stack. */
#include "oneshot.h"
static volatile int seen, value, order[4], on_stack;
static char stack[65536];
static void on_rt(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    order[seen++] = info->si_value.sival_int;
    char here;
    on_stack = &here > stack && &here < stack + sizeof stack;
}
static void on_usr(int signal) { value = signal; }
int main(int argc, char **argv) {
    begin(argc, argv);
    stack_t alt = {.ss_sp = stack, .ss_size = sizeof stack};
    CHECK(sigaltstack(&alt, 0) == 0);
    struct sigaction rt = {.sa_sigaction = on_rt, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    struct sigaction usr = {.sa_handler = on_usr, .sa_flags = SA_RESETHAND}, found;
    sigaddset(&rt.sa_mask, SIGUSR2);
    CHECK(sigaction(SIGRTMIN + 1, &rt, 0) == 0 && sigaction(SIGUSR1, &usr, 0) == 0);
    signal(SIGPIPE, SIG_IGN);
    sigset_t mask, before, pending;
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN + 1);
    sigaddset(&mask, SIGUSR1);
    CHECK(sigprocmask(SIG_BLOCK, &mask, 0) == 0);
    for (int i = 0; i < 3; i++) CHECK(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){100 + i}) == 0);
    pthread_kill(pthread_self(), SIGUSR1);
    ready();
    wait_for_term();
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) && seen == 0);
    CHECK(sigprocmask(0, 0, &before) == 0 && sigismember(&before, SIGRTMIN + 1));
    CHECK(sigaction(SIGRTMIN + 1, 0, &found) == 0 && found.sa_sigaction == on_rt);
    CHECK((found.sa_flags & SA_ONSTACK) && sigismember(&found.sa_mask, SIGUSR2));
    CHECK(sigprocmask(SIG_UNBLOCK, &mask, 0) == 0);
    CHECK(seen == 3 && order[0] == 100 && order[1] == 101 && order[2] == 102 && on_stack);
    CHECK(value == SIGUSR1 && sigaction(SIGUSR1, 0, &found) == 0 && found.sa_handler == SIG_DFL);
    CHECK(sigaction(SIGPIPE, 0, &found) == 0 && found.sa_handler == SIG_IGN);
    verdict("PASS");
}
