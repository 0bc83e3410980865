/* Vectors of LANES floats for the kernels in this folder, by an extension of GCC and Clang that works on any processor.
 * LANES is the width of the processor's own vectors: wider ones would be split up and go through memory. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* Rows of a tile: with three vectors per row, its sums fill the registers without spilling. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *from) { return *(const vec *)from; }

INLINE void store(float *to, vec x) { *(vec *)to = x; }

INLINE vec all(float x) { return (vec){0} + x; }

INLINE vec choose(ints where, vec yes, vec no) { return (vec)((where & (ints)yes) | (~where & (ints)no)); }

INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* e^x to about one unit in the last place, 0 below e^-87; NaN stays NaN. x = n ln 2 + rest, e^x = 2^n e^rest, with a
 * polynomial for e^rest (Cephes). */
INLINE vec exponential(vec x) {
    const vec lowest = all(-87.0f), highest = all(88.0f);
    ints vanishes = x < lowest;
    x = choose(vanishes, lowest, x);
    x = choose(x > highest, highest, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds n into the lowest bits */
    ints exponent = (ints)shifted - 0x4B400000;
    vec whole = shifted - 12582912.0f, rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    return choose(vanishes, all(0), y * (vec)((exponent + 127) << 23));
}
