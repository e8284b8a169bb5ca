/* Registers of the processor while a thread computes without a system call: general, x87, AVX. */
#include "oneshot.h"
#include <immintrin.h>
static volatile int over;
static volatile long turns;
/* Fills all vector registers, waits in a loop that touches none, and looks. */
__attribute__((noinline, target("avx"))) static int hold(unsigned seed) {
    unsigned in[16 * 8], out[16 * 8];
    for (int i = 0; i < 128; i++) in[i] = seed + i * 2654435761u;
    __asm__ volatile(
        "vmovups (%0), %%ymm0\n vmovups 32(%0), %%ymm1\n vmovups 64(%0), %%ymm2\n"
        "vmovups 96(%0), %%ymm3\n vmovups 128(%0), %%ymm4\n vmovups 160(%0), %%ymm5\n"
        "vmovups 192(%0), %%ymm6\n vmovups 224(%0), %%ymm7\n vmovups 256(%0), %%ymm8\n"
        "vmovups 288(%0), %%ymm9\n vmovups 320(%0), %%ymm10\n vmovups 352(%0), %%ymm11\n"
        "vmovups 384(%0), %%ymm12\n vmovups 416(%0), %%ymm13\n vmovups 448(%0), %%ymm14\n"
        "vmovups 480(%0), %%ymm15\n"
        "1: incq %2\n cmpl $0, %3\n je 1b\n"
        "vmovups %%ymm0, (%1)\n vmovups %%ymm1, 32(%1)\n vmovups %%ymm2, 64(%1)\n"
        "vmovups %%ymm3, 96(%1)\n vmovups %%ymm4, 128(%1)\n vmovups %%ymm5, 160(%1)\n"
        "vmovups %%ymm6, 192(%1)\n vmovups %%ymm7, 224(%1)\n vmovups %%ymm8, 256(%1)\n"
        "vmovups %%ymm9, 288(%1)\n vmovups %%ymm10, 320(%1)\n vmovups %%ymm11, 352(%1)\n"
        "vmovups %%ymm12, 384(%1)\n vmovups %%ymm13, 416(%1)\n vmovups %%ymm14, 448(%1)\n"
        "vmovups %%ymm15, 480(%1)\n"
        : : "r"(in), "r"(out), "m"(turns), "m"(over)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
          "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    return !memcmp(in, out, sizeof in);
}
static int mark;
static void *compute(void *arg) {
    unsigned csr = _mm_getcsr() | 0x8040, found;
    unsigned short word = 0x0f7f, x87;
    _mm_setcsr(csr);
    __asm__ volatile("fldcw %0" : : "m"(word));
    int same = __builtin_cpu_supports("avx") ? hold(4711) : 1;
    __asm__ volatile("fnstcw %0" : "=m"(x87));
    found = _mm_getcsr();
    return same && x87 == word && found == csr ? arg : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    pthread_t thread;
    CHECK(pthread_create(&thread, 0, compute, &mark) == 0);
    while (__builtin_cpu_supports("avx") && !turns) usleep(1000);
    ready();
    wait_for_term();
    over = 1;
    void *result;
    CHECK(pthread_join(thread, &result) == 0 && result);
    verdict("PASS");
}
