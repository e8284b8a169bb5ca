/* A daemon that has forked twice: the leader of its session and group is no more. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    pid_t leader = getpid(), middle = fork();
    if (middle) _exit(0);
    while (getppid() == leader) usleep(1000);
    CHECK(getsid(0) == leader && getpgrp() == leader);
    ready();
    wait_for_term();
    CHECK(getsid(0) == leader && getpgrp() == leader && getpid() != leader);
    CHECK(kill(leader, 0) == -1 && errno == ESRCH);
    verdict("PASS");
}
