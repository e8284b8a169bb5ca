/* Files that are deleted and open, appended to, by O_PATH; a directory that is half read. */
#include "oneshot.h"
#include <dirent.h>
#include <sys/syscall.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    char name[PATH_MAX], text[64];
    snprintf(name, sizeof name, "%s.gone", outfile);
    int gone = open(name, O_RDWR | O_CREAT | O_TRUNC, 0640);
    put(gone, "deleted, but open", 17);
    CHECK(lseek(gone, 9, SEEK_SET) == 9 && unlink(name) == 0);
    int again = dup(gone);
    snprintf(name, sizeof name, "%s.log2", outfile);
    int log = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_NOATIME, 0600);
    put(log, "one\n", 4);
    int sync = open(name, O_RDWR | O_SYNC), path = open(name, O_PATH | O_CLOEXEC);
    int exclusive = open("/dev/zero", O_RDONLY), full = open("/dev/full", O_WRONLY);
    char dir[PATH_MAX];
    *strrchr(strcpy(dir, outfile), '/') = 0;
    int here = open(dir, O_PATH | O_DIRECTORY), list = open("/proc/self/ns", O_RDONLY | O_DIRECTORY);
    char entries[80];
    long first = syscall(SYS_getdents64, list, entries, sizeof entries);
    off_t at = lseek(list, 0, SEEK_CUR);
    CHECK(first > 0 && at > 0 && here >= 0 && path >= 0 && sync >= 0);
    ready();
    wait_for_term();
    get(again, text, 8);
    CHECK(!memcmp(text, "but open", 8) && lseek(gone, 0, SEEK_CUR) == 17);
    struct stat now_is;
    CHECK(fstat(gone, &now_is) == 0 && now_is.st_nlink == 0 && (now_is.st_mode & 07777) == 0640);
    put(log, "two\n", 4);
    CHECK((fcntl(log, F_GETFL) & (O_APPEND | O_NOATIME)) == (O_APPEND | O_NOATIME));
    CHECK((fcntl(sync, F_GETFL) & O_SYNC) == O_SYNC);
    get(sync, text, 8);
    CHECK(!memcmp(text, "one\ntwo\n", 8));
    CHECK((fcntl(path, F_GETFL) & O_PATH) && read(path, text, 1) == -1 && errno == EBADF);
    CHECK(fcntl(path, F_GETFD) == FD_CLOEXEC);
    CHECK(faccessat(here, strrchr(name, '/') + 1, R_OK, 0) == 0);
    get(exclusive, text, 4);
    CHECK(!memcmp(text, "\0\0\0\0", 4) && write(full, "x", 1) == -1 && errno == ENOSPC);
    CHECK(lseek(list, 0, SEEK_CUR) == at && syscall(SYS_getdents64, list, entries, 80) > 0);
    verdict("PASS");
}
