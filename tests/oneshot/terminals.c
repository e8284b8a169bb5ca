/* Pseudo terminals: what was typed and what was printed, modes, sizes, sessions that they control. */
#include "oneshot.h"
#include <sys/ioctl.h>
#include <termios.h>
static int report[2];
static int open_master(char *name, size_t size) {
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    CHECK(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    CHECK(ptsname_r(master, name, size) == 0);
    return master;
}
static void set_raw(int end, struct termios *t) {
    CHECK(tcgetattr(end, t) == 0);
    cfmakeraw(t);
    t->c_cc[VMIN] = 3;
    t->c_cc[VTIME] = 0;
    t->c_cflag |= CSTOPB;
    CHECK(cfsetspeed(t, B19200) == 0 && tcsetattr(end, TCSANOW, t) == 0 && tcgetattr(end, t) == 0);
}
static int same(const struct termios *a, const struct termios *b) {
    return a->c_iflag == b->c_iflag && a->c_oflag == b->c_oflag && a->c_cflag == b->c_cflag &&
           a->c_lflag == b->c_lflag && a->c_line == b->c_line && !memcmp(a->c_cc, b->c_cc, NCCS);
}
static void expect(int fd, const char *text) {
    char got[128];
    ssize_t n = read(fd, got, sizeof got);
    if (n != (ssize_t)strlen(text) || memcmp(got, text, n)) FAIL("%.*s, not %s", (int)n, got, text);
}
static int waiting(int fd) {
    int n = -1;
    CHECK(ioctl(fd, FIONREAD, &n) == 0);
    return n;
}
/* What goes through a terminal arrives a moment later. */
static void until_waiting(int fd, int bytes) {
    for (uint64_t until = now() + 60000000000ull; waiting(fd) < bytes;) CHECK(now() < until);
    CHECK(waiting(fd) == bytes);
}
/* Leads a session that a terminal controls; a child of it is in the foreground. */
static volatile sig_atomic_t interrupted, resized;
static void on_signal(int signal) { *(signal == SIGINT ? &interrupted : &resized) = 1; }
static void lead(const char *name) {
    CHECK(setsid() == getpid());
    int end = open(name, O_RDWR);
    CHECK(end >= 0 && tcgetsid(end) == getpid());
    pid_t front = fork();
    if (!front) {
        struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
        CHECK(sigaction(SIGINT, &action, 0) == 0 && sigaction(SIGWINCH, &action, 0) == 0);
        /* They come in the wait only, or one could come between the look and the wait. */
        sigset_t none, both;
        sigemptyset(&none);
        sigemptyset(&both);
        sigaddset(&both, SIGINT);
        sigaddset(&both, SIGWINCH);
        CHECK(sigprocmask(SIG_BLOCK, &both, 0) == 0);
        put(report[1], "f", 1);
        while (!interrupted || !resized) sigsuspend(&none);
        _exit(7);
    }
    CHECK(setpgid(front, front) == 0);
    /* Its own place in the background would stop it here. */
    signal(SIGTTOU, SIG_IGN);
    CHECK(tcsetpgrp(end, front) == 0);
    put(report[1], "l", 1);
    told = 0;
    wait_for_term();
    CHECK(tcgetsid(end) == getpid() && tcgetpgrp(end) == front);
    int again = open("/dev/tty", O_RDWR), status;
    CHECK(again >= 0 && waitpid(front, &status, 0) == front);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7 && tcsetpgrp(end, getpgrp()) == 0);
    told = 0;
    put(again, "it was told\n", 12);
    /* The end of a leader hangs its terminal up, and what nobody has read by then may be gone. */
    wait_for_term();
    _exit(3);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(pipe(report) == 0);
    char name[5][64], text[128];
    /* Lines: one that is whole, and the beginning of the next. Echo and output wait at the master. */
    int lines = open_master(name[0], 64), typed = open(name[0], O_RDWR | O_NOCTTY);
    CHECK(typed >= 0 && fchmod(typed, 0640) == 0 && fchown(typed, 1234, 5) == 0);
    put(lines, "whole line\nbegun", 16);
    until_waiting(lines, 17);
    put(typed, "output\n", 7);
    until_waiting(lines, 25);
    until_waiting(typed, 11);
    /* Raw, with a size, and bytes both ways. */
    struct termios modes, now_modes;
    struct winsize size = {33, 111, 640, 480}, now_size;
    int raw = open_master(name[1], 64), raw_end = open(name[1], O_RDWR | O_NOCTTY | O_NONBLOCK);
    CHECK(raw_end >= 0);
    set_raw(raw_end, &modes);
    CHECK(ioctl(raw, TIOCSWINSZ, &size) == 0);
    put(raw, "\x03\x04 r\n", 5);
    put(raw_end, "a\nb", 3);
    until_waiting(raw_end, 5);
    until_waiting(raw, 3);
    /* Packet mode, exclusive, locked against openers; nobody has opened the last one. */
    int packets = open_master(name[2], 64), packets_end = open(name[2], O_RDWR | O_NOCTTY), on = 1;
    CHECK(packets_end >= 0 && ioctl(packets, TIOCPKT, &on) == 0 && ioctl(packets_end, TIOCEXCL) == 0);
    CHECK(tcgetattr(packets_end, &now_modes) == 0);
    now_modes.c_oflag &= ~OPOST;
    CHECK(tcsetattr(packets_end, TCSANOW, &now_modes) == 0);
    put(packets_end, "packet", 6);
    int fresh = posix_openpt(O_RDWR | O_NOCTTY), locked = 0;
    CHECK(fresh >= 0 && ptsname_r(fresh, name[3], 64) == 0);
    int control = open_master(name[4], 64);
    pid_t leader = fork();
    if (!leader) lead(name[4]);
    get(report[0], text, 2);
    ready();
    wait_for_term();
    struct stat stat;
    char again[64];
    CHECK(ptsname_r(lines, again, 64) == 0 && !strcmp(again, name[0]) && fstat(typed, &stat) == 0);
    CHECK((stat.st_mode & 07777) == 0640 && stat.st_uid == 1234 && stat.st_gid == 5);
    expect(lines, "whole line\r\nbegunoutput\r\n");
    expect(typed, "whole line\n");
    put(lines, "\x7f\x7f...\n", 6);
    expect(typed, "beg...\n");
    CHECK(tcgetattr(raw_end, &now_modes) == 0 && same(&modes, &now_modes));
    CHECK(ioctl(raw_end, TIOCGWINSZ, &now_size) == 0 && !memcmp(&size, &now_size, sizeof size));
    CHECK(waiting(raw_end) == 5 && waiting(raw) == 3);
    expect(raw_end, "\x03\x04 r\n");
    expect(raw, "a\nb");
    CHECK(ioctl(packets, TIOCGPKT, &on) == 0 && on == 1 && ioctl(packets_end, TIOCGEXCL, &on) == 0 && on == 1);
    CHECK(read(packets, text, 64) == 7 && text[0] == 0 && !memcmp(text + 1, "packet", 6));
    CHECK(tcflush(packets_end, TCIFLUSH) == 0 && read(packets, text, 64) == 1 && text[0] == TIOCPKT_FLUSHREAD);
    CHECK(ioctl(fresh, TIOCGPTLCK, &locked) == 0 && locked == 1);
    CHECK(open(name[3], O_RDWR | O_NOCTTY) == -1 && errno == EIO && unlockpt(fresh) == 0);
    int fresh_end = open(name[3], O_RDWR | O_NOCTTY);
    CHECK(fresh_end >= 0);
    put(fresh_end, "first", 5);
    expect(fresh, "first");
    /* The one in the foreground hears of a key and of a new size; then its leader is told. */
    int status;
    CHECK(ioctl(control, TIOCSWINSZ, &size) == 0);
    put(control, "\x03", 1);
    CHECK(kill(leader, SIGTERM) == 0);
    size_t n = 0;
    while (n < 13 || memcmp(text + n - 13, "it was told\r\n", 13)) {
        CHECK(n < sizeof text);
        ssize_t more = read(control, text + n, sizeof text - n);
        CHECK(more > 0);
        n += more;
    }
    CHECK(kill(leader, SIGTERM) == 0 && waitpid(leader, &status, 0) == leader);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    verdict("PASS");
}
