/* Memory of every protection, large, with holes, grown and given back. */
#include "oneshot.h"
#define SIZE (48 << 20)
static int data = 4711, zero[100000];
static uint64_t sum(const unsigned char *p, size_t n) {
    uint64_t s = 14695981039346656037ull;
    for (size_t i = 0; i < n; i += 61) s = (s ^ p[i]) * 1099511628211ull;
    return s;
}
static int deep(int level) {
    volatile char pad[8192];
    memset((char *)pad, level, sizeof pad);
    if (level == 100) {
        ready();
        wait_for_term();
        return pad[1];
    }
    int r = deep(level + 1);
    return r == 100 && pad[77] == (char)level ? r : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    unsigned char *a = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *b = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char *c = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int exe = open("/proc/self/exe", O_RDONLY);
    unsigned char *f = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, exe, 0);
    CHECK(a != MAP_FAILED && b != MAP_FAILED && c != MAP_FAILED && f != MAP_FAILED);
    for (size_t i = 0; i < SIZE; i += 8) *(uint64_t *)(a + i) = i * 0x9e3779b97f4a7c15ull;
    memset(b, 7, 1 << 20);
    memset(c, 9, 1 << 20);
    f[100] = 42;
    CHECK(munmap(a + (10 << 20), 1 << 20) == 0 && madvise(a + (20 << 20), 1 << 20, MADV_DONTNEED) == 0);
    CHECK(mprotect(c, 4096, PROT_READ) == 0 && mprotect(c + 4096, 4096, PROT_NONE) == 0);
    char *heap = malloc(3000000);
    memset(heap, 'h', 3000000);
    zero[99999] = 5;
    uint64_t sums[3] = {sum(a, 10 << 20), sum(a + (11 << 20), SIZE - (11 << 20)), sum(b, 1 << 20)};
    CHECK(deep(1) == 100);
    CHECK(sum(a, 10 << 20) == sums[0] && sum(a + (11 << 20), SIZE - (11 << 20)) == sums[1]);
    CHECK(sum(b, 1 << 20) == sums[2] && a[20 << 20] == 0 && f[100] == 42 && f[1] == 'E');
    unsigned char in[2];
    CHECK(mincore(a + (10 << 20), 4096, in) == -1 && errno == ENOMEM);
    CHECK(c[0] == 9 && read(exe, c, 1) == -1 && errno == EFAULT);
    CHECK(mprotect(c, 8192, PROT_READ | PROT_WRITE) == 0 && c[4096] == 9);
    c[0] = 1;
    for (int i = 0; i < 3000000; i++) CHECK(heap[i] == 'h');
    char *more = malloc(5000000);
    memset(more, 1, 5000000);
    free(heap);
    CHECK(zero[99999] == 5 && zero[0] == 0 && data == 4711);
    verdict("PASS");
}
