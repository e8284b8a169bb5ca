/* eventfd, timerfd, epoll. */
#include "oneshot.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    int count = eventfd(5, EFD_NONBLOCK), semaphore = eventfd(3, EFD_SEMAPHORE);
    int never = timerfd_create(CLOCK_MONOTONIC, 0), ticking = timerfd_create(CLOCK_BOOTTIME, 0);
    struct itimerspec far = {.it_value = {5000, 0}}, often = {{0, 3000000}, {0, 3000000}}, found;
    CHECK(timerfd_settime(never, 0, &far, 0) == 0 && timerfd_settime(ticking, 0, &often, 0) == 0);
    int epoll = epoll_create1(EPOLL_CLOEXEC), outer = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1234567890abcdef};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, count, &event) == 0);
    event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.u64 = 7};
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, ticking, &event) == 0);
    uint64_t since = now();
    ready();
    wait_for_term();
    uint64_t value, sum = 0;
    CHECK(epoll_wait(epoll, &event, 1, 0) == 1 && event.data.u64 == 0x1234567890abcdef);
    get(count, &value, 8);
    CHECK(value == 5 && read(count, &value, 8) == -1 && errno == EAGAIN);
    CHECK(epoll_wait(epoll, &event, 1, 0) == 0 && fcntl(epoll, F_GETFD) == FD_CLOEXEC);
    for (int i = 0; i < 3; i++) {
        get(semaphore, &value, 8);
        CHECK(value == 1);
    }
    CHECK(timerfd_gettime(never, &found) == 0 && found.it_value.tv_sec > 4000);
    CHECK(timerfd_gettime(ticking, &found) == 0 && found.it_interval.tv_nsec == 3000000);
    for (int i = 0; i < 5; i++) {
        CHECK(epoll_wait(outer, &event, 1, 60000) == 1 && event.data.u64 == 7);
        get(ticking, &value, 8);
        CHECK(value >= 1);
        sum += value;
    }
    /* It has counted on meanwhile, whoever held it; a moment may be lost each time. */
    uint64_t periods = (now() - since) / 3000000, slack = 5 + periods / 100;
    if (sum + slack < periods || sum > periods + slack) FAIL("%d of %d periods", (int)sum, (int)periods);
    verdict("PASS");
}
