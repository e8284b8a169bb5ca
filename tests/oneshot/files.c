/* Files: offsets, shared ones, flags, numbers; a directory; a device. */
#include "oneshot.h"
#include <dirent.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    char name[PATH_MAX], text[16] = "";
    snprintf(name, sizeof name, "%s.data", outfile);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600), copy = dup(fd);
    int other = open(name, O_RDONLY | O_CLOEXEC), end = open(name, O_WRONLY | O_APPEND);
    put(fd, "0123456789", 10);
    CHECK(lseek(fd, 4, SEEK_SET) == 4 && lseek(other, 7, SEEK_SET) == 7);
    int high = fcntl(fd, F_DUPFD, 700), random = open("/dev/urandom", O_RDONLY);
    *strrchr(strcpy(name, outfile), '/') = 0;
    int dir = open(name, O_RDONLY | O_DIRECTORY);
    CHECK(high == 700 && dir >= 0 && random >= 0);
    ready();
    wait_for_term();
    get(copy, text, 2);
    CHECK(!memcmp(text, "45", 2) && lseek(fd, 0, SEEK_CUR) == 6 && lseek(high, 0, SEEK_CUR) == 6);
    get(other, text, 3);
    CHECK(!memcmp(text, "789", 3) && fcntl(other, F_GETFD) == FD_CLOEXEC && fcntl(fd, F_GETFD) == 0);
    put(end, "ab", 2);
    CHECK(lseek(fd, 10, SEEK_SET) == 10);
    get(copy, text, 2);
    CHECK(!memcmp(text, "ab", 2) && (fcntl(end, F_GETFL) & O_APPEND));
    CHECK(write(other, "x", 1) == -1 && errno == EBADF);
    get(random, text, 8);
    DIR *listing = fdopendir(dir);
    CHECK(listing && readdir(listing));
    verdict("PASS");
}
