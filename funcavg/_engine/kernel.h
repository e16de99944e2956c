/* What kernel.c and wires.c share: the compiler, levels, numbers and their bits, the processor's mode. */

#ifndef FUNCAVG_KERNEL_H
#define FUNCAVG_KERNEL_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "built with -ffast-math: means would not be rounded right"
#endif
#if !defined(FLT_EVAL_METHOD) || FLT_EVAL_METHOD != 0
#error "float and double are calculated in another width here: means would be rounded twice"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,f16c")))
#else
#define X86 0
#endif

/* An output may be one of the inputs, element for element; it never lies askew to one. */
#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EACH _Pragma("GCC ivdep")
#else
#define EACH
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define VISIBLE
#if defined(__GNUC__)
#undef VISIBLE
#define VISIBLE __attribute__((visibility("default")))
#endif

enum { BASELINE, AVX2 }; /* levels: baseline code, and functions for processors that have more */

/* ---- Numbers and their bits ---- */

INLINE float float_at(const char *p, size_t i) { float x; memcpy(&x, p + 4 * i, 4); return x; }
INLINE double double_at(const char *p, size_t i) { double x; memcpy(&x, p + 8 * i, 8); return x; }
INLINE uint16_t half_at(const char *p, size_t i) { uint16_t x; memcpy(&x, p + 2 * i, 2); return x; }
INLINE void put_float(char *p, size_t i, float x) { memcpy(p + 4 * i, &x, 4); }
INLINE void put_double(char *p, size_t i, double x) { memcpy(p + 8 * i, &x, 8); }
INLINE void put_half(char *p, size_t i, uint16_t x) { memcpy(p + 2 * i, &x, 2); }
INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float from_bfloat16(uint16_t h) { return float_of((uint32_t)h << 16); }

INLINE uint16_t to_bfloat16(float x) /* to nearest, ties to even */
{
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? (u >> 16) | 0x40 : rounded); /* rounding could make a NaN infinite */
}

/* ---- How the processor calculates ---- */

/* A thread may flush denormal numbers, round otherwise, or trap; here it does not. Kept are its flags, too. */
#if X86
typedef unsigned int mode;
static mode begin_exact(void)
{
    mode before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* nothing flushed, to nearest, all exceptions masked */
    return before;
}
static void end_exact(mode before) { _mm_setcsr(before); }
#else
typedef int mode;
static mode begin_exact(void) { return 0; }
static void end_exact(mode before) { (void)before; }
#endif

#endif
