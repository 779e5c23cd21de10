/* What the CPU can do at most: the ceilings that kernels are measured against. */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

/* Reads `bytes` (a multiple of 1024 per thread) with every thread; the sum keeps the reads. */
int64_t read_all(const char *memory, int64_t bytes, int num_threads)
{
    int64_t total = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : total)
    {
        int64_t share = bytes / omp_get_num_threads() / 1024 * 1024;
        const char *from = memory + omp_get_thread_num() * share;
        __m512i sums[4] = {0};
        for (int64_t i = 0; i < share; i += 256)
            for (int j = 0; j < 4; j++)
                sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(from + i + 64 * j));
        for (int j = 0; j < 4; j++)
            total += _mm512_reduce_add_epi64(sums[j]);
    }
    return total;
}

#define STEP(n) sum##n = _mm512_dpbf16_ps(sum##n, x, x);
#define ALL(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

/* 12 independent chains of VDPBF16PS, operands in registers: 64 * 12 FLOP a round and thread. */
float multiply_all(int64_t rounds, int num_threads)
{
    float total = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : total)
    {
        __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00);
#define DECLARE(n) __m512 sum##n = _mm512_set1_ps(n);
        ALL(DECLARE)
        for (int64_t i = 0; i < rounds; i++) {
            ALL(STEP)
        }
#define REDUCE(n) total += _mm512_reduce_add_ps(sum##n);
        ALL(REDUCE)
    }
    return total;
}
