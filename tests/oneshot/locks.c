/* Locks of files: flock, of a process (fcntl), of an open file description; a lease. */
#include "oneshot.h"
#include <sys/file.h>
static int open_it(int flags) {
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.locked", outfile);
    int fd = open(name, flags | O_CREAT, 0600);
    CHECK(fd >= 0);
    return fd;
}
static struct flock range(short type, off_t from, off_t length) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = from, .l_len = length};
}
/* What another process meets there. */
static int meets(off_t at) {
    int status;
    pid_t child = fork();
    if (!child) {
        struct flock look = range(F_WRLCK, at, 1);
        _exit(fcntl(open_it(O_RDWR), F_GETLK, &look) ? 99 : look.l_type);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    return WEXITSTATUS(status);
}
static int is_flocked(int fd) {
    int other = open("/proc/self/fd/0", O_RDONLY);
    close(other);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    other = open(path, O_RDONLY);
    int taken = flock(other, LOCK_EX | LOCK_NB);
    close(other);
    return taken == -1 && errno == EWOULDBLOCK;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.flocked", outfile);
    int process = open_it(O_RDWR), description = open_it(O_RDWR);
    int whole = open(name, O_RDWR | O_CREAT, 0600);
    struct flock write = range(F_WRLCK, 0, 10), reads = range(F_RDLCK, 20, 5);
    struct flock own = range(F_WRLCK, 100, 0);
    CHECK(fcntl(process, F_SETLK, &write) == 0 && fcntl(process, F_SETLK, &reads) == 0);
    CHECK(fcntl(description, F_OFD_SETLK, &own) == 0 && flock(whole, LOCK_EX) == 0);
    snprintf(name, sizeof name, "%s.leased", outfile);
    close(open(name, O_WRONLY | O_CREAT, 0600));
    int leased = open(name, O_RDONLY);
    CHECK(fcntl(leased, F_SETLEASE, F_RDLCK) == 0);
    CHECK(meets(5) == F_WRLCK && meets(22) == F_RDLCK && meets(5000) == F_WRLCK);
    ready();
    wait_for_term();
    CHECK(meets(0) == F_WRLCK && meets(9) == F_WRLCK && meets(10) == F_UNLCK);
    CHECK(meets(20) == F_RDLCK && meets(24) == F_RDLCK && meets(25) == F_UNLCK);
    CHECK(meets(100) == F_WRLCK && meets(1000000) == F_WRLCK && meets(99) == F_UNLCK);
    CHECK(is_flocked(whole) && fcntl(leased, F_GETLEASE) == F_RDLCK);
    own.l_type = F_UNLCK;
    CHECK(fcntl(description, F_OFD_SETLK, &own) == 0 && meets(5000) == F_UNLCK);
    CHECK(flock(whole, LOCK_UN) == 0 && !is_flocked(whole));
    verdict("PASS");
}
