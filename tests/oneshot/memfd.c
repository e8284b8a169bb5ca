/* memfds: mapped, written, sealed, without a descriptor, shared by a child. */
#include "oneshot.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    int fd = memfd_create("one", MFD_ALLOW_SEALING), sealed = memfd_create("two", MFD_ALLOW_SEALING);
    int mapped = memfd_create("three", MFD_CLOEXEC);
    CHECK(ftruncate(fd, 100000) == 0 && pwrite(fd, "in one", 6, 50000) == 6);
    put(sealed, "never again", 11);
    CHECK(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    CHECK(ftruncate(mapped, 8192) == 0);
    char *memory = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0);
    close(mapped);
    memory[4097] = 'm';
    int own = open("/proc/self/fd/3", O_RDONLY);
    pid_t child = fork();
    if (!child) {
        wait_for_term();
        memory[1] = 'c';
        CHECK(pwrite(fd, "child", 5, 0) == 5);
        _exit(lseek(fd, 0, SEEK_CUR) == 77 ? 3 : 4);
    }
    CHECK(lseek(fd, 77, SEEK_SET) == 77 && own >= 0);
    ready();
    wait_for_term();
    int status;
    char text[16];
    CHECK(kill(child, SIGTERM) == 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(memory[1] == 'c' && memory[4097] == 'm');
    CHECK(pread(fd, text, 6, 50000) == 6 && !memcmp(text, "in one", 6));
    CHECK(pread(own, text, 5, 0) == 5 && !memcmp(text, "child", 5) && lseek(own, 0, SEEK_CUR) == 0);
    CHECK(fcntl(sealed, F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SEAL));
    CHECK(write(sealed, "x", 1) == -1 && errno == EPERM && pread(sealed, text, 16, 0) == 11);
    CHECK(fcntl(fd, F_GET_SEALS) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    CHECK(readlink("/proc/self/fd/3", text, 16) == 16 && !memcmp(text, "/memfd:one (dele", 16));
    verdict("PASS");
}
