/* Files mapped private and shared, whole and in part, deleted, longer than their mapping. */
#include "oneshot.h"
#define PAGE 4096
static char *map(int fd, int prot, int flags, off_t at, size_t pages) {
    char *p = mmap(0, pages * PAGE, prot, flags, fd, at * PAGE);
    CHECK(p != MAP_FAILED);
    return p;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    const int both = PROT_READ | PROT_WRITE;
    char name[PATH_MAX], page[PAGE], text[8];
    snprintf(name, sizeof name, "%s.mapped", outfile);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (int i = 0; i < 16; i++) {
        memset(page, 'a' + i, sizeof page);
        put(fd, page, sizeof page);
    }
    char *shared = map(fd, both, MAP_SHARED, 0, 16), *part = map(fd, both, MAP_SHARED, 4, 4);
    char *private = map(fd, both, MAP_PRIVATE, 0, 16), *view = map(fd, PROT_READ, MAP_SHARED, 0, 16);
    char *none = map(fd, PROT_NONE, MAP_SHARED, 8, 1);
    shared[5 * PAGE] = 'S';
    private[6 * PAGE] = 'P';
    CHECK(munmap(shared + 10 * PAGE, PAGE) == 0);
    snprintf(name, sizeof name, "%s.unlinked", outfile);
    int gone = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(ftruncate(gone, 3 * PAGE) == 0);
    char *deleted = map(gone, both, MAP_SHARED, 0, 3);
    close(gone);
    CHECK(unlink(name) == 0);
    deleted[PAGE] = 'D';
    pid_t child = fork();
    if (!child) {
        wait_for_term();
        shared[7 * PAGE] = 'C';
        deleted[2 * PAGE] = 'C';
        _exit(private[6 * PAGE] == 'P' ? 3 : 4);
    }
    ready();
    wait_for_term();
    int status;
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(part[PAGE] == 'S' && view[5 * PAGE] == 'S' && view[7 * PAGE] == 'C');
    CHECK(private[6 * PAGE] == 'P' && view[6 * PAGE] == 'g' && private[5 * PAGE + 1] == 'f');
    CHECK(deleted[PAGE] == 'D' && deleted[2 * PAGE] == 'C');
    unsigned char in;
    CHECK(mincore(shared + 10 * PAGE, PAGE, &in) == -1 && errno == ENOMEM);
    CHECK(mprotect(none, PAGE, both) == 0 && none[1] == 'i');
    none[1] = 'N';
    CHECK(pread(fd, text, 3, 8 * PAGE) == 3 && text[1] == 'N');
    CHECK(pread(fd, text, 1, 7 * PAGE) == 1 && text[0] == 'C');
    CHECK(pwrite(fd, "w", 1, 9 * PAGE) == 1 && shared[9 * PAGE] == 'w');
    verdict("PASS");
}
