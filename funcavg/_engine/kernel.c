/* The kernel's arithmetic in C: the bits of arithmetic.py, in one pass over memory.
 *
 * Loaded with ctypes by kernel.py, which knows these functions and `struct means`; `struct step` and `struct copy` are
 * rows of table.py's. It needs no Python, no libm, no threads, and returns at once. Every element is summed by itself:
 * no other has a say in its bits. Memory may lie at any address, so it is read and written by memcpy, which compilers
 * make a plain move.
 *
 * Loops are written for compilers to vectorise. What they make of them is compiled twice where that helps, for any
 * processor of the platform and for one with AVX2 and F16C, and chosen when it runs. IEEE 754 and C99 leave no choice
 * of bits here, but for NaN's: hence no fast-math and no contraction, and on x86 denormal numbers are never flushed.
 */

#include "kernel.h"

#define VERSION 4 /* of this interface: kernel.py has the same */

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };  /* dtypes, as kernel.py numbers them */
enum { EQUAL = 1, SCALED = 2 };                /* flags of a sum of float64: see struct sums */
enum { BLOCK = 1024 };                         /* elements: all that is kept of them stays in the first-level cache */

static const double SMALL = 1.0 / 18446744073709551616.0; /* 2**-64, exact to multiply by: see arithmetic.py */

static const double ONES[] = {1, 1, 1, 1};

/* What is prepared once for many means. */
struct means {
    int64_t count;
    const double *weights; /* NULL where all are the same */
    double norm;           /* the sum of weights */
    int32_t from, into;    /* dtypes of shards and of what is written */
    int32_t level;
};

/* Sums of a block. Of float64, `first` has the first shard, and `flags` says of each element whether all shards are
 * EQUAL so far, and whether its total is SCALED by SMALL, since it is larger than any number. Else both are NULL. */
struct sums {
    double *total;
    const char *first;
    uint8_t *flags;
};

/* What a rank does with a bucket in the memory of its node: a row of table.py's. Addresses are numbers. */
struct step {
    int64_t action;
    int64_t waits, least; /* a word, -1 for none, and what it must have come to at least */
    int64_t tells, told;  /* a word, -1 for none, and what it comes to */
    int64_t count; /* of COPY: how many there are, and the first of them */
    uint64_t copies;
    uint64_t means, shards, out, also, nbytes; /* of MEAN: what funcavg_mean takes */
};
struct copy {
    uint64_t to, from, nbytes;
};
enum { PYTHON, COPY, MEAN }; /* actions */

static const size_t SIZES[] = {4, 8, 2, 2};

/* ---- Numbers and their bits ---- */

INLINE int is_finite(double x) { return x >= -DBL_MAX && x <= DBL_MAX; }

INLINE float from_float16(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float normal = float_of(magnitude + (112u << 23));                      /* another bias */
    float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23); /* no leading one: subtract it */
    float special = float_of(magnitude + (224u << 23));                     /* infinite, NaN */
    float x = (h & 0x7c00) == 0 ? subnormal : (h & 0x7c00) == 0x7c00 ? special : normal;
    return float_of(bits_of(x) | sign);
}

INLINE uint16_t to_float16(float x) /* to nearest, ties to even */
{
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* Beside 1/2, the last place of a float is 2**-24, as that of a subnormal float16: so the addition rounds. */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t y = magnitude < (113u << 23) ? subnormal : normal;
    y = magnitude >= (143u << 23) ? 0x7c00 : y;           /* 2**16 and more; less may round to infinity in `normal` */
    y = magnitude > 0x7f800000 ? 0x7e00 : y;
    return (uint16_t)(y | sign);
}

/* Cut to the precision of a float, leaving a trace of what was cut: the next rounding is then the only one. */
INLINE float to_odd_float(double x)
{
    const uint64_t cut = ((uint64_t)1 << 29) - 1;
    uint64_t u;
    memcpy(&u, &x, 8);
    u = (u | ((u & cut) + cut)) & ~cut;
    memcpy(&x, &u, 8);
    return (float)x;
}

/* ---- Blocks between dtypes ---- */

INLINE void widen_body(int from, float *out, const char *shard, size_t length)
{
    if (from == BFLOAT16) {
        for (size_t i = 0; i < length; i++) out[i] = from_bfloat16(half_at(shard, i));
    } else {
        for (size_t i = 0; i < length; i++) out[i] = from_float16(half_at(shard, i));
    }
}

INLINE void narrow_body(int into, char *out, const float *numbers, size_t length)
{
    if (into == BFLOAT16) {
        for (size_t i = 0; i < length; i++) put_half(out, i, to_bfloat16(numbers[i]));
    } else {
        for (size_t i = 0; i < length; i++) put_half(out, i, to_float16(numbers[i]));
    }
}

/* ---- Sums ---- */

INLINE double number_at(int from, const char *p, size_t i)
{
    return from == BFLOAT16 ? from_bfloat16(half_at(p, i)) : float_at(p, i);
}

/* Add `count` shards, which is 1 to 4, in one pass; with `begin` they are the first. */
INLINE void add_together(int from, int count, int weighted, int begin, double *total, const char *const *shards,
                         const double *weights, size_t length)
{
    const char *a = shards[0], *b = shards[count > 1 ? 1 : 0], *c = shards[count > 2 ? 2 : 0];
    const char *d = shards[count > 3 ? 3 : 0];
    double wa = weighted ? weights[0] : 1, wb = weighted && count > 1 ? weights[1] : 1;
    double wc = weighted && count > 2 ? weights[2] : 1, wd = weighted && count > 3 ? weights[3] : 1;
    EACH
    for (size_t i = 0; i < length; i++) {
        double sum = number_at(from, a, i) * wa;
        if (!begin) sum = total[i] + sum;
        if (count > 1) sum += number_at(from, b, i) * wb;
        if (count > 2) sum += number_at(from, c, i) * wc;
        if (count > 3) sum += number_at(from, d, i) * wd;
        total[i] = sum;
    }
}

INLINE void add_floats(int from, int weighted, double *total, const char *const *shards, const double *weights,
                       int count, int begin, size_t length)
{
    if (begin) {
        if (count == 1) add_together(from, 1, weighted, 1, total, shards, weights, length);
        else if (count == 2) add_together(from, 2, weighted, 1, total, shards, weights, length);
        else if (count == 3) add_together(from, 3, weighted, 1, total, shards, weights, length);
        else add_together(from, 4, weighted, 1, total, shards, weights, length);
    } else if (count == 4) {
        add_together(from, 4, weighted, 0, total, shards, weights, length);
    } else {
        for (int k = 0; k < count; k++)
            add_together(from, 1, weighted, 0, total, shards + k, weights + k, length);
    }
}

/* Sums that may become larger than any number, one by one: from then on times SMALL. */
static void add_large(struct sums sums, const char *shard, double weight, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        double product = double_at(shard, i) * weight, total = sums.total[i] + product;
        if (!(sums.flags[i] & SCALED) && !is_finite(total)) {
            sums.flags[i] |= SCALED;
            sums.total[i] *= SMALL;
        }
        sums.total[i] = sums.flags[i] & SCALED ? sums.total[i] + product * SMALL : total;
    }
}

INLINE void add_doubles(struct sums sums, const char *shard, double weight, int begin, size_t length)
{
    double *total = sums.total;
    uint8_t *flags = sums.flags;
    if (begin) {
        for (size_t i = 0; i < length; i++) total[i] = double_at(shard, i) * weight;
        for (size_t i = 0; i < length; i++) flags[i] = double_at(shard, i) != 0 ? EQUAL : 0; /* zeros have signs */
        return;
    }
    int plain = 1, scaled = 0;
    for (size_t i = 0; i < length; i++) {
        double next = total[i] + double_at(shard, i) * weight;
        plain &= (next >= -DBL_MAX) & (next <= DBL_MAX);
    }
    for (size_t i = 0; i < length; i++) scaled |= flags[i] & SCALED;
    if (plain && !scaled) {
        for (size_t i = 0; i < length; i++) total[i] += double_at(shard, i) * weight;
    } else {
        add_large(sums, shard, weight, length);
    }
    for (size_t i = 0; i < length; i++)
        flags[i] &= double_at(shard, i) == double_at(sums.first, i) ? EQUAL | SCALED : SCALED;
}

/* Add 1 to 4 shards. */
INLINE void add_body(int from, struct sums sums, const char *const *shards, const double *weights, int weighted,
                     int count, int begin, size_t length, void (*widen)(int, float *, const char *, size_t))
{
    float numbers[4][BLOCK];
    const char *wider[4];
    if (from == FLOAT64) {
        for (int k = 0; k < count; k++) add_doubles(sums, shards[k], weights[k], begin && k == 0, length);
        return;
    }
    if (from == FLOAT16) {
        for (int k = 0; k < count; k++) {
            widen(from, numbers[k], shards[k], length);
            wider[k] = (const char *)numbers[k];
        }
        shards = wider;
    }
    if (from == BFLOAT16) {
        if (weighted) add_floats(BFLOAT16, 1, sums.total, shards, weights, count, begin, length);
        else add_floats(BFLOAT16, 0, sums.total, shards, weights, count, begin, length);
    } else {
        if (weighted) add_floats(FLOAT32, 1, sums.total, shards, weights, count, begin, length);
        else add_floats(FLOAT32, 0, sums.total, shards, weights, count, begin, length);
    }
}

/* Divide the sums. By a power of two that is a multiplication, with the same bits. */
INLINE void divide(double *total, double norm, size_t length)
{
    uint64_t bits;
    memcpy(&bits, &norm, 8);
    if ((bits & (((uint64_t)1 << 52) - 1)) == 0 && norm >= 1 && norm <= 1e15) {
        double inverse = 1 / norm;
        for (size_t i = 0; i < length; i++) total[i] *= inverse;
    } else {
        for (size_t i = 0; i < length; i++) total[i] /= norm;
    }
}

/* The mean of float64 whose sum is larger than any number; it is not, but may be rounded so. */
INLINE double mean_of_large(double small)
{
    small = small > DBL_MAX * SMALL && is_finite(small) ? DBL_MAX * SMALL : small;
    small = small < -DBL_MAX * SMALL && is_finite(small) ? -DBL_MAX * SMALL : small;
    return small / SMALL;
}

INLINE void write_body(int into, char *out, struct sums sums, double norm, size_t length,
                       void (*narrow)(int, char *, const float *, size_t))
{
    float numbers[BLOCK];
    double *mean = sums.total;
    divide(mean, norm, length);
    if (into == FLOAT32) {
        EACH
        for (size_t i = 0; i < length; i++) put_float(out, i, (float)mean[i]);
    } else if (into != FLOAT64) {
        for (size_t i = 0; i < length; i++) numbers[i] = to_odd_float(mean[i]);
        narrow(into, out, numbers, length);
    } else {
        const uint8_t *flags = sums.flags;
        int scaled = 0;
        for (size_t i = 0; i < length; i++) scaled |= flags[i] & SCALED;
        for (size_t i = 0; scaled && i < length; i++)
            if (flags[i] & SCALED) mean[i] = mean_of_large(mean[i]);
        EACH
        for (size_t i = 0; i < length; i++) {
            double first = double_at(sums.first, i);
            put_double(out, i, flags[i] & EQUAL ? first : mean[i]);
        }
    }
}

/* The mean of 1 to 4 shards of float64 in one pass, to other memory. Returns whether all are finite: where one is not,
 * its sum may be too large, and the block is to be done again with struct sums. */
INLINE int mean_of_doubles(int count, double *mean, const char *const *shards, const double *weights, double norm,
                           size_t length)
{
    const char *a = shards[0], *b = shards[count > 1 ? 1 : 0], *c = shards[count > 2 ? 2 : 0];
    const char *d = shards[count > 3 ? 3 : 0];
    double wa = weights[0], wb = weights[count > 1 ? 1 : 0], wc = weights[count > 2 ? 2 : 0];
    double wd = weights[count > 3 ? 3 : 0];
    int finite = 1;
    EACH
    for (size_t i = 0; i < length; i++) {
        double x = double_at(a, i), sum = x * wa;
        int equal = x != 0; /* zeros have signs */
        if (count > 1) {
            sum += double_at(b, i) * wb;
            equal &= double_at(b, i) == x;
        }
        if (count > 2) {
            sum += double_at(c, i) * wc;
            equal &= double_at(c, i) == x;
        }
        if (count > 3) {
            sum += double_at(d, i) * wd;
            equal &= double_at(d, i) == x;
        }
        sum /= norm;
        finite &= (sum >= -DBL_MAX) & (sum <= DBL_MAX);
        mean[i] = equal ? x : sum;
    }
    return finite;
}

INLINE int doubles_body(int count, double *mean, const char *const *shards, const double *weights, double norm,
                        size_t length)
{
    if (count == 1) return mean_of_doubles(1, mean, shards, weights, norm, length);
    if (count == 2) return mean_of_doubles(2, mean, shards, weights, norm, length);
    if (count == 3) return mean_of_doubles(3, mean, shards, weights, norm, length);
    return mean_of_doubles(4, mean, shards, weights, norm, length);
}

/* ---- Two shards of the same weight ---- */

/* One addition rounds once, and halving is exact, so no wider sum is needed. Where the sum overflows, both numbers are
 * so large that their halves are exact, and the sum of these rounds once. */
INLINE void halve_floats(char *out, const char *one, const char *other, size_t length)
{
    EACH
    for (size_t i = 0; i < length; i++) {
        float a = float_at(one, i), b = float_at(other, i), sum = a + b, halves = 0.5f * a + 0.5f * b;
        put_float(out, i, (bits_of(sum) & 0x7fffffff) < 0x7f800000 ? 0.5f * sum : halves);
    }
}

INLINE void halve_doubles(char *out, const char *one, const char *other, size_t length)
{
    EACH
    for (size_t i = 0; i < length; i++) {
        double a = double_at(one, i), b = double_at(other, i), sum = a + b, halves = 0.5 * a + 0.5 * b;
        double magnitude = sum < 0 ? -sum : sum;
        put_double(out, i, magnitude <= DBL_MAX ? 0.5 * sum : halves);
    }
}

/* Halves of narrow floats are exact in float, and their sum, rounded there and then to 16 bits, is rounded right. */
INLINE void halve_bfloat16(char *out, const char *one, const char *other, size_t length)
{
    EACH
    for (size_t i = 0; i < length; i++) {
        float mean = 0.5f * from_bfloat16(half_at(one, i)) + 0.5f * from_bfloat16(half_at(other, i));
        uint32_t u = bits_of(mean); /* a NaN comes of 16 bits here, so rounding leaves it one */
        put_half(out, i, (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16));
    }
}

INLINE void halve_float16(char *out, const char *one, const char *other, size_t length)
{
    EACH
    for (size_t i = 0; i < length; i++)
        put_half(out, i, to_float16(0.5f * from_float16(half_at(one, i)) + 0.5f * from_float16(half_at(other, i))));
}

/* ---- For one level ---- */

/* The mean of a block. The sums are complete before anything is written: `out` may be one of the shards. */
#define LEVEL(target, name)                                                                                           \
    target static void add_##name(int from, struct sums sums, const char *const *shards, const double *weights,       \
                                  int weighted, int count, int begin, size_t length)                                  \
    {                                                                                                                 \
        add_body(from, sums, shards, weights, weighted, count, begin, length, widen_##name);                          \
    }                                                                                                                 \
    target static void write_##name(int into, char *out, struct sums sums, double norm, size_t length)                \
    {                                                                                                                 \
        write_body(into, out, sums, norm, length, narrow_##name);                                                     \
    }                                                                                                                 \
    target static int doubles_##name(int count, double *mean, const char *const *shards, const double *weights,       \
                                     double norm, size_t length)                                                      \
    {                                                                                                                 \
        return doubles_body(count, mean, shards, weights, norm, length);                                              \
    }                                                                                                                 \
    target static void halve_##name(int from, char *out, const char *one, const char *other, size_t length)           \
    {                                                                                                                 \
        if (from == FLOAT32) halve_floats(out, one, other, length);                                                   \
        else if (from == FLOAT64) halve_doubles(out, one, other, length);                                             \
        else if (from == BFLOAT16) halve_bfloat16(out, one, other, length);                                           \
        else halve_float16_##name(out, one, other, length);                                                           \
    }

static void widen_baseline(int from, float *out, const char *shard, size_t length)
{
    widen_body(from, out, shard, length);
}

static void narrow_baseline(int into, char *out, const float *numbers, size_t length)
{
    narrow_body(into, out, numbers, length);
}

static void halve_float16_baseline(char *out, const char *one, const char *other, size_t length)
{
    halve_float16(out, one, other, length);
}

LEVEL(, baseline)

#if X86
INLINE WITH_AVX2 __m256 eight_at(const char *p, size_t i)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 2 * i)));
}

INLINE WITH_AVX2 void put_eight(char *p, size_t i, __m256 x)
{
    _mm_storeu_si128((__m128i *)(void *)(p + 2 * i), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

WITH_AVX2 static void widen_avx2(int from, float *out, const char *shard, size_t length)
{
    size_t whole = from == FLOAT16 ? length & ~(size_t)7 : 0;
    for (size_t i = 0; i < whole; i += 8) _mm256_storeu_ps(out + i, eight_at(shard, i));
    widen_body(from, out + whole, shard + 2 * whole, length - whole);
}

WITH_AVX2 static void narrow_avx2(int into, char *out, const float *numbers, size_t length)
{
    size_t whole = into == FLOAT16 ? length & ~(size_t)7 : 0;
    for (size_t i = 0; i < whole; i += 8) put_eight(out, i, _mm256_loadu_ps(numbers + i));
    narrow_body(into, out + 2 * whole, numbers + whole, length - whole);
}

WITH_AVX2 static void halve_float16_avx2(char *out, const char *one, const char *other, size_t length)
{
    size_t whole = length & ~(size_t)7;
    __m256 half = _mm256_set1_ps(0.5f);
    for (size_t i = 0; i < whole; i += 8) {
        __m256 a = _mm256_mul_ps(half, eight_at(one, i)), b = _mm256_mul_ps(half, eight_at(other, i));
        put_eight(out, i, _mm256_add_ps(a, b));
    }
    halve_float16(out + 2 * whole, one + 2 * whole, other + 2 * whole, length - whole);
}

LEVEL(WITH_AVX2, avx2)
#endif

static void add(int level, int from, struct sums sums, const char *const *shards, const double *weights, int weighted,
                int count, int begin, size_t length)
{
#if X86
    if (level == AVX2) {
        add_avx2(from, sums, shards, weights, weighted, count, begin, length);
        return;
    }
#endif
    (void)level;
    add_baseline(from, sums, shards, weights, weighted, count, begin, length);
}

static void write_mean(int level, int into, char *out, struct sums sums, double norm, size_t length)
{
#if X86
    if (level == AVX2) {
        write_avx2(into, out, sums, norm, length);
        return;
    }
#endif
    (void)level;
    write_baseline(into, out, sums, norm, length);
}

static int mean_of_few_doubles(int level, int count, double *mean, const char *const *shards, const double *weights,
                               double norm, size_t length)
{
#if X86
    if (level == AVX2) return doubles_avx2(count, mean, shards, weights, norm, length);
#endif
    (void)level;
    return doubles_baseline(count, mean, shards, weights, norm, length);
}

static void halve(int level, int from, char *out, const char *one, const char *other, size_t length)
{
#if X86
    if (level == AVX2) {
        halve_avx2(from, out, one, other, length);
        return;
    }
#endif
    (void)level;
    halve_baseline(from, out, one, other, length);
}

/* ---- What kernel.py calls ---- */

VISIBLE int32_t funcavg_version(void);
VISIBLE uint32_t funcavg_source(void);
VISIBLE int32_t funcavg_level(void);
VISIBLE void funcavg_mean(const struct means *, const void *const *, void *, void *, size_t);
VISIBLE void funcavg_add(const struct means *, const void *, double, int32_t, double *, void *, uint8_t *, size_t);
VISIBLE void funcavg_write(const struct means *, void *, double, double *, const void *, uint8_t *, size_t);
VISIBLE int64_t funcavg_steps(const struct step *, int64_t, int64_t, const uint64_t *, int64_t, int64_t);

int32_t funcavg_version(void) { return VERSION; }

/* Which source this was built from, so that a test can tell an old library. */
#ifndef FUNCAVG_SOURCE
#define FUNCAVG_SOURCE 0
#endif
uint32_t funcavg_source(void) { return FUNCAVG_SOURCE; }

/* The best level that this processor and its operating system have. */
int32_t funcavg_level(void)
{
#if X86
    unsigned int a, b, c = 0, d;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C)) return AVX2;
#endif
    return BASELINE;
}

/* Write a block of the mean of a few shards of float64, if none of it is too large; return whether it is written. */
static int few_doubles(const struct means *means, double *mean, const void *const *shards, char *target, size_t start,
                       size_t size)
{
    const char *parts[4];
    const double *weights = means->weights ? means->weights : ONES;
    if (means->from != FLOAT64 || means->count > 4) return 0;
    for (int k = 0; k < (int)means->count; k++) parts[k] = (const char *)shards[k] + start * sizeof(double);
    if (!mean_of_few_doubles(means->level, (int)means->count, mean, parts, weights, means->norm, size)) return 0;
    memcpy(target, mean, size * sizeof(double));
    return 1;
}

/* Write the mean of shards of `nbytes` each to `out`, which may be one of them, and to `also` if it is not NULL. */
void funcavg_mean(const struct means *means, const void *const *shards, void *out, void *also, size_t nbytes)
{
    double total[BLOCK];
    uint8_t flags[BLOCK];
    mode before = begin_exact();
    int pair = means->count == 2 && means->weights == NULL && means->from == means->into;
    size_t from = SIZES[means->from], into = SIZES[means->into], length = nbytes / from;
    for (size_t start = 0; start < length; start += BLOCK) {
        size_t size = length - start < BLOCK ? length - start : BLOCK;
        const char *first = (const char *)shards[0] + start * from;
        char *target = (char *)out + start * into;
        if (pair) {
            halve(means->level, means->from, target, first, (const char *)shards[1] + start * from, size);
        } else if (!few_doubles(means, total, shards, target, start, size)) {
            struct sums sums = {total, first, flags};
            for (int64_t k = 0; k < means->count; k += 4) {
                int few = means->count - k < 4 ? (int)(means->count - k) : 4;
                const char *parts[4];
                const double *weights = means->weights ? means->weights + k : ONES;
                for (int m = 0; m < few; m++) parts[m] = (const char *)shards[k + m] + start * from;
                add(means->level, means->from, sums, parts, weights, means->weights != NULL, few, k == 0, size);
            }
            write_mean(means->level, means->into, target, sums, means->norm, size);
        }
        if (also != NULL) memcpy((char *)also + start * into, target, size * into);
    }
    end_exact(before);
}

/* Add a shard to sums; with `begin` it is the first of them. */
void funcavg_add(const struct means *means, const void *shard, double weight, int32_t begin, double *total, void *first,
                 uint8_t *flags, size_t nbytes)
{
    mode before = begin_exact();
    size_t from = SIZES[means->from], length = nbytes / from;
    if (begin && means->from == FLOAT64) memcpy(first, shard, nbytes);
    for (size_t start = 0; start < length; start += BLOCK) {
        size_t size = length - start < BLOCK ? length - start : BLOCK;
        struct sums sums = {total + start, NULL, NULL};
        if (means->from == FLOAT64) {
            sums.first = (const char *)first + start * from;
            sums.flags = flags + start;
        }
        const char *part = (const char *)shard + start * from;
        add(means->level, means->from, sums, &part, &weight, weight != 1.0, 1, begin, size);
    }
    end_exact(before);
}

/* Write what the sums are, divided by `norm`. */
void funcavg_write(const struct means *means, void *out, double norm, double *total, const void *first, uint8_t *flags,
                   size_t nbytes)
{
    mode before = begin_exact();
    size_t into = SIZES[means->into], length = nbytes / into;
    for (size_t start = 0; start < length; start += BLOCK) {
        size_t size = length - start < BLOCK ? length - start : BLOCK;
        struct sums sums = {total + start, NULL, NULL};
        if (means->into == FLOAT64) {
            sums.first = (const char *)first + start * into;
            sums.flags = flags + start;
        }
        write_mean(means->level, means->into, (char *)out + start * into, sums, norm, size);
    }
    end_exact(before);
}

/* Words are read and written by other processes, and order what lies in slots. */
#if defined(__GNUC__)
#define WORDS 1
static int64_t word_at(uint64_t address) { return __atomic_load_n((const int64_t *)(uintptr_t)address, __ATOMIC_ACQUIRE); }
static void put_word(uint64_t address, int64_t x) { __atomic_store_n((int64_t *)(uintptr_t)address, x, __ATOMIC_RELEASE); }
#else
#define WORDS 0
static int64_t word_at(uint64_t address) { (void)address; return -1; }
static void put_word(uint64_t address, int64_t x) { (void)address; (void)x; }
#endif

static void *pointer(uint64_t address) { return (void *)(uintptr_t)address; }

/* Go through steps from `position` to `end`, as far as others have come; return where it has stopped. Counts are of
 * this call: `before` it others have counted so far. A row of `words`, one for each word, has `width` numbers: where
 * this rank's own lies, how many others count it, and where theirs lie. */
int64_t funcavg_steps(const struct step *steps, int64_t position, int64_t end, const uint64_t *words, int64_t width,
                      int64_t before)
{
    for (; WORDS && position < end; position++) {
        const struct step *step = steps + position;
        if (step->action == PYTHON) return position;
        if (step->waits >= 0) {
            const uint64_t *row = words + step->waits * width;
            for (uint64_t k = 0; k < row[1]; k++)
                if (word_at(row[2 + k]) < before + step->least) return position;
        }
        if (step->action == COPY) {
            const struct copy *copy = pointer(step->copies);
            for (int64_t k = 0; k < step->count; k++)
                memcpy(pointer(copy[k].to), pointer(copy[k].from), (size_t)copy[k].nbytes);
        } else {
            funcavg_mean(pointer(step->means), pointer(step->shards), pointer(step->out), pointer(step->also),
                         (size_t)step->nbytes);
        }
        if (step->tells >= 0) put_word(words[step->tells * width], before + step->told);
    }
    return position;
}
