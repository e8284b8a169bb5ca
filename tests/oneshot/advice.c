/* What was said of memory: madvise, mlock, mprotect, and that it still means it. */
#include "oneshot.h"
#define PAGE 4096
static char *memory;
/* The line "VmFlags" of the mapping that begins here. */
static int has_flag(char *start, const char *flag) {
    char line[512], want[32];
    FILE *maps = fopen("/proc/self/smaps", "r");
    snprintf(want, sizeof want, "%lx-", (unsigned long)start);
    int here = 0, found = 0;
    while (fgets(line, sizeof line, maps)) {
        if (!strncmp(line, want, strlen(want))) here = 1;
        if (here && !strncmp(line, "VmFlags:", 8)) {
            found = strstr(line, flag) != 0;
            break;
        }
    }
    fclose(maps);
    return found;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    memory = mmap(0, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memset(memory, 'm', 64 * PAGE);
    CHECK(madvise(memory, 4 * PAGE, MADV_DONTFORK) == 0);
    CHECK(madvise(memory + 8 * PAGE, 4 * PAGE, MADV_WIPEONFORK) == 0);
    CHECK(madvise(memory + 16 * PAGE, 4 * PAGE, MADV_DONTDUMP) == 0);
    madvise(memory + 24 * PAGE, 4 * PAGE, MADV_NOHUGEPAGE);
    CHECK(mlock(memory + 32 * PAGE, 4 * PAGE) == 0);
    CHECK(mprotect(memory + 40 * PAGE, 4 * PAGE, PROT_NONE) == 0);
    CHECK(mprotect(memory + 48 * PAGE, 4 * PAGE, PROT_READ) == 0);
    ready();
    wait_for_term();
    CHECK(has_flag(memory, " dc") && has_flag(memory + 8 * PAGE, " wf"));
    CHECK(has_flag(memory + 16 * PAGE, " dd") && has_flag(memory + 32 * PAGE, " lo"));
    int status;
    pid_t child = fork();
    if (!child) {
        unsigned char in;
        if (mincore(memory, PAGE, &in) == 0 || errno != ENOMEM) _exit(4);
        if (memory[8 * PAGE] || memory[13 * PAGE] != 'm') _exit(5);
        _exit(3);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    CHECK(memory[8 * PAGE] == 'm' && memory[48 * PAGE] == 'm');
    int null = open("/dev/zero", O_RDONLY);
    CHECK(read(null, memory + 48 * PAGE, 1) == -1 && errno == EFAULT);
    CHECK(read(null, memory + 40 * PAGE, 1) == -1 && errno == EFAULT);
    CHECK(mprotect(memory + 40 * PAGE, 4 * PAGE, PROT_READ) == 0 && memory[41 * PAGE] == 'm');
    verdict("PASS");
}
