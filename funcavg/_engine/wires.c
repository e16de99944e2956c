/* Wires in C: the bytes and bits of funcavg/wires/, block by block.
 *
 * Called by coders.py, which knows these functions and `struct wire`. rounded.py, rotated.py and blocks.py say what is
 * written, and why; here it is written in passes over a block that stays in the first-level cache. Whole numbers are
 * integers here and floats there, and both are exact.
 */

#include "kernel.h"

enum { LARGEST = 1024, SMALLEST = 64, RUN = 32 }; /* numbers in a rotated block; in what is transformed in registers */
enum { INT8_BLOCK = 256, SCALE = 4 };             /* numbers in a block of int8; bytes of a scale */
enum { PRECISION = 13 };                          /* bits of the integers that a rotated block becomes first */

static const uint32_t INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fc00000, NORMAL = 0x00800000;

/* How rows are written. */
struct wire {
    int32_t bits; /* of a number in the code: 16 is bfloat16 */
    int32_t level;
    const uint32_t *signs; /* LARGEST of them for what ranks send, and as many for means: 0 or the bit of a sign */
    double middles[7];     /* between neighbouring centroids, in standard deviations */
    int32_t centroids[8];
};

/* Signs of numbers that have been compared, products and squares of them: what a scale is made of. */
struct fit {
    uint64_t product, squares;
};

/* ---- Numbers ---- */

INLINE uint32_t word_of(const void *p) { uint32_t u; memcpy(&u, p, 4); return u; }
INLINE void put_word_of(void *p, uint32_t u) { memcpy(p, &u, 4); }

/* Beside 1.5 * 2**23, the last place of a float is 1: so the addition rounds to nearest, ties to even. */
INLINE int32_t nearest(float x) { return (int32_t)(bits_of(x + 12582912.0f) - bits_of(12582912.0f)); }

INLINE float power_of_two(int exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

INLINE double times_power_of_two(double x, int exponent)
{
    uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return x * power;
}

INLINE double square_root(double x) /* rounded right, and without libm */
{
#if X86
    return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(x)));
#else
    return __builtin_sqrt(x);
#endif
}

/* The largest magnitude's bits: those of a NaN are larger than those of infinity, and these than of any number. */
INLINE uint32_t top_of(const char *numbers, size_t length)
{
    int32_t top = 0;
    for (size_t i = 0; i < length; i++) {
        int32_t magnitude = (int32_t)(word_of(numbers + 4 * i) & 0x7fffffff);
        top = magnitude > top ? magnitude : top;
    }
    return (uint32_t)top;
}

/* Times a denormal scale, whatever the processor does with such numbers. Its bits count 2**-149s. */
INLINE uint32_t times_denormal(int32_t integer, uint32_t scale)
{
    uint64_t product = (uint64_t)(integer < 0 ? -integer : integer) * scale; /* below 2**47: exact as double, too */
    uint32_t sign = integer < 0 ? 0x80000000 : 0;
    if (product >> 24) return bits_of((float)times_power_of_two((double)product, -149)) | sign;
    return (uint32_t)product | sign;
}

/* Write integers times their scale, none above `limit`, and change signs where there are any. */
INLINE void put_times(char *numbers, const int32_t *integers, size_t length, uint32_t scale, const uint32_t *signs,
                      float limit)
{
    float factor = float_of(scale);
    if ((scale & 0x7fffffff) > INFINITE || scale == 0) {
        for (size_t i = 0; i < length; i++) put_word_of(numbers + 4 * i, scale == 0 ? 0 : NOT_A_NUMBER);
    } else if (scale < NORMAL) {
        for (size_t i = 0; i < length; i++)
            put_word_of(numbers + 4 * i, times_denormal(integers[i], scale) ^ (signs ? signs[i] : 0));
    } else {
        EACH
        for (size_t i = 0; i < length; i++) {
            float x = (float)integers[i] * factor;
            x = limit < x ? limit : x;
            x = -limit > x ? -limit : x;
            put_word_of(numbers + 4 * i, bits_of(x) ^ (signs ? signs[i] : 0));
        }
    }
}

/* ---- int8 ---- */

INLINE void encode_int8(const char *numbers, size_t length, uint8_t *code)
{
    uint32_t top = top_of(numbers, length);
    float scale = float_of(top) / 127.0f;
    if (top >= INFINITE || !(scale > 0)) {
        put_word_of(code, top >= INFINITE ? NOT_A_NUMBER : 0);
        memset(code + SCALE, 0, length);
        return;
    }
    put_word_of(code, bits_of(scale));
    EACH
    for (size_t i = 0; i < length; i++) {
        float x = float_at(numbers, i) / scale;
        x = 127.0f < x ? 127.0f : x; /* a denormal scale is rounded much */
        x = -127.0f > x ? -127.0f : x;
        code[SCALE + i] = (uint8_t)nearest(x);
    }
}

INLINE void decode_int8(const uint8_t *code, char *numbers, size_t length, float limit)
{
    int32_t integers[INT8_BLOCK];
    for (size_t i = 0; i < length; i++) integers[i] = (int8_t)code[SCALE + i];
    put_times(numbers, integers, length, word_of(code), NULL, limit);
}

/* ---- The transform ---- */

/* One step of it, or two at once, between numbers that lie `stride` apart, which is a multiple of LANES. */
#define STEPS(type, LANES)                                                                                            \
    INLINE void one_step_##type(type *v, size_t size, size_t stride)                                                  \
    {                                                                                                                 \
        for (size_t begin = 0; begin < size; begin += 2 * stride) {                                                   \
            for (size_t k = begin; k < begin + stride; k += LANES) {                                                  \
                EACH                                                                                                  \
                for (size_t i = k; i < k + LANES; i++) {                                                              \
                    type a = v[i], b = v[i + stride];                                                                 \
                    v[i] = (type)(a + b);                                                                             \
                    v[i + stride] = (type)(a - b);                                                                    \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void two_steps_##type(type *v, size_t size, size_t stride)                                                 \
    {                                                                                                                 \
        for (size_t begin = 0; begin < size; begin += 4 * stride) {                                                   \
            for (size_t k = begin; k < begin + stride; k += LANES) {                                                  \
                EACH                                                                                                  \
                for (size_t i = k; i < k + LANES; i++) {                                                              \
                    type a = v[i], b = v[i + stride], c = v[i + 2 * stride], d = v[i + 3 * stride];                   \
                    type ab = (type)(a + b), cd = (type)(c + d), a_b = (type)(a - b), c_d = (type)(c - d);            \
                    v[i] = (type)(ab + cd);                                                                           \
                    v[i + stride] = (type)(a_b + c_d);                                                                \
                    v[i + 2 * stride] = (type)(ab - cd);                                                              \
                    v[i + 3 * stride] = (type)(a_b - c_d);                                                            \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void long_steps_##type(type *v, size_t size) /* from RUN on */                                             \
    {                                                                                                                 \
        size_t stride = RUN;                                                                                          \
        for (; 4 * stride <= size; stride *= 4) two_steps_##type(v, size, stride);                                    \
        if (stride < size) one_step_##type(v, size, stride);                                                          \
    }

STEPS(int32_t, 8)
STEPS(int16_t, 16)

/* The steps of strides below RUN. */
INLINE void short_steps_body(int32_t *v, size_t size)
{
    for (size_t k = 0; k < size; k += 8) {
        int32_t *p = v + k;
        int32_t a = p[0] + p[1], b = p[0] - p[1], c = p[2] + p[3], d = p[2] - p[3];
        int32_t e = p[4] + p[5], f = p[4] - p[5], g = p[6] + p[7], h = p[6] - p[7];
        int32_t ac = a + c, bd = b + d, a_c = a - c, b_d = b - d, eg = e + g, fh = f + h, e_g = e - g, f_h = f - h;
        p[0] = ac + eg, p[1] = bd + fh, p[2] = a_c + e_g, p[3] = b_d + f_h;
        p[4] = ac - eg, p[5] = bd - fh, p[6] = a_c - e_g, p[7] = b_d - f_h;
    }
    two_steps_int32_t(v, size, 8);
}

/* ---- Rotated blocks ---- */

/* Write the indices of centroids, with signs, and return what the scale is made of. */
INLINE struct fit quantise_body(int bits, const int32_t *rotated, size_t size, const int32_t *thresholds,
                                const int32_t *centroids, uint8_t *indices)
{
    const int count = (1 << (bits - 1)) - 1; /* thresholds */
    struct fit fit = {0, 0};
    int32_t gaps[7];
    for (int k = 0; k < count; k++) gaps[k] = centroids[k + 1] - centroids[k];
    for (size_t i = 0; i < size; i++) {
        int32_t magnitude = rotated[i] < 0 ? -rotated[i] : rotated[i], index = 0, centroid = centroids[0];
        for (int k = 0; k < count; k++) {
            index += magnitude > thresholds[k] ? 1 : 0;
            centroid += magnitude > thresholds[k] ? gaps[k] : 0;
        }
        fit.product += (uint64_t)(uint32_t)magnitude * (uint32_t)centroid;
        fit.squares += (uint32_t)(centroid * centroid);
        indices[i] = (uint8_t)(index | (rotated[i] < 0 ? 1 << (bits - 1) : 0));
    }
    return fit;
}

/* A byte holds numbers that lie a half, or a quarter, of the block apart. */
INLINE void pack(int bits, const uint8_t *indices, size_t size, uint8_t *code)
{
    size_t part = size * (size_t)bits / 8;
    for (size_t i = 0; i < part; i++) {
        uint32_t byte = indices[i] | (uint32_t)indices[i + part] << bits;
        if (bits == 2) byte |= (uint32_t)indices[i + 2 * part] << 4 | (uint32_t)indices[i + 3 * part] << 6;
        code[i] = (uint8_t)byte;
    }
}

INLINE void centroids_body(int bits, const uint8_t *code, size_t size, const int16_t *centroids, int16_t *out)
{
    size_t part = size * (size_t)bits / 8;
    for (size_t i = 0; i < part; i++) {
        uint32_t byte = code[i], mask = bits == 4 ? 15 : 3;
        for (size_t k = 0; k < 8 / (size_t)bits; k++) out[i + k * part] = centroids[byte >> (k * (size_t)bits) & mask];
    }
}

/* What a level has of its own. */
typedef void short_steps(int32_t *, size_t);
typedef struct fit quantise(int, const int32_t *, size_t, const int32_t *, const int32_t *, uint8_t *);
typedef void look_up(int, const uint8_t *, size_t, const int16_t *, int16_t *);

/* Write the code of a block of `length` numbers, as one of `size`. */
INLINE void encode_rotated(const struct wire *wire, int bits, const char *numbers, size_t length, size_t size,
                           const uint32_t *signs, uint8_t *code, short_steps *steps, quantise *indices_of)
{
    float filled[LARGEST];
    int32_t v[LARGEST], thresholds[7];
    uint8_t indices[LARGEST];
    uint32_t top = top_of(numbers, length);
    uint64_t squares = 0;
    int shift = 0;
    if (top >= INFINITE || top == 0) {
        put_word_of(code, top == 0 ? 0 : NOT_A_NUMBER);
        memset(code + SCALE, 0, size * (size_t)bits / 8);
        return;
    }
    if (length < size || float_of(top) < power_of_two(-100)) { /* so small that their factor would be infinite */
        shift = float_of(top) < power_of_two(-100) ? 64 : 0;
        for (size_t i = 0; i < length; i++) filled[i] = float_at(numbers, i) * power_of_two(shift);
        for (size_t i = length; i < size; i++) filled[i] = 0;
        top = bits_of(float_of(top) * power_of_two(shift));
        numbers = (const char *)filled;
    }
    int exponent = (int)(top >> 23) - 126;
    float factor = power_of_two(PRECISION - exponent);
    for (size_t i = 0; i < size; i++)
        v[i] = nearest(float_of(word_of(numbers + 4 * i) ^ signs[i]) * factor);
    for (size_t i = 0; i < size; i++) {
        uint32_t magnitude = (uint32_t)(v[i] < 0 ? -v[i] : v[i]);
        squares += (uint64_t)magnitude * magnitude;
    }
    steps(v, size);
    long_steps_int32_t(v, size);
    double root = square_root((double)squares), energy = (double)(size * squares);
    for (int k = 0; k < (1 << (bits - 1)) - 1; k++) thresholds[k] = (int32_t)(wire->middles[k] * root);
    struct fit fit = indices_of(bits, v, size, thresholds, wire->centroids, indices);
    double product = (double)fit.product, centroids = (double)fit.squares, scale = energy / product;
    if (scale * scale * centroids > 2 * energy) scale = product / centroids; /* unbiased is too dear */
    exponent -= shift + PRECISION;
    for (size_t k = size; k > 1; k /= 2) exponent--;
    put_word_of(code, bits_of((float)times_power_of_two(scale, exponent)));
    pack(bits, indices, size, code + SCALE);
}

INLINE void decode_rotated(const struct wire *wire, int bits, const uint8_t *code, char *numbers, size_t length,
                           size_t size, const uint32_t *signs, float limit, short_steps *steps, look_up *find)
{
    int16_t centroids[16], narrow[LARGEST]; /* 32 centroids of 10 bits are 16 bits, with a sign */
    int32_t v[LARGEST];
    int count = 1 << (bits - 1);
    for (int k = 0; k < count; k++) {
        centroids[k] = (int16_t)wire->centroids[k];
        centroids[count + k] = (int16_t)-wire->centroids[k];
    }
    find(bits, code + SCALE, size, centroids, narrow);
    long_steps_int16_t(narrow, size);
    for (size_t i = 0; i < size; i++) v[i] = narrow[i];
    steps(v, size);
    put_times(numbers, v, length, word_of(code), signs, limit);
}

/* ---- Rows ---- */

/* Of numbers that a rotated block has which is made of `length`; of what is a block of int8, none. */
INLINE size_t size_of(int bits, size_t length)
{
    size_t size = SMALLEST;
    if (bits == 8 || 2 * length < SMALLEST) return 0;
    while (size < length) size *= 2;
    return size;
}

INLINE void encode_body(const struct wire *wire, int bits, const int64_t *pieces, int64_t count, const char *numbers,
                        uint8_t *code, const uint32_t *signs, short_steps *steps, quantise *indices_of)
{
    const size_t whole = bits == 8 ? INT8_BLOCK : LARGEST;
    for (int64_t k = 0; k < count; k++) {
        const char *p = numbers + 4 * pieces[2 * k];
        size_t left = (size_t)pieces[2 * k + 1];
        while (left > 0) {
            size_t length = left < whole ? left : whole, size = size_of(bits, length);
            if (size == LARGEST) encode_rotated(wire, bits, p, length, LARGEST, signs, code, steps, indices_of);
            else if (size > 0) encode_rotated(wire, bits, p, length, size, signs, code, steps, indices_of);
            else if (length == INT8_BLOCK) encode_int8(p, INT8_BLOCK, code);
            else encode_int8(p, length, code);
            code += SCALE + (size > 0 ? size * (size_t)bits / 8 : length);
            p += 4 * length;
            left -= length;
        }
    }
}

INLINE void decode_body(const struct wire *wire, int bits, const int64_t *pieces, int64_t count, const uint8_t *code,
                        char *numbers, const uint32_t *signs, float limit, short_steps *steps, look_up *find)
{
    const size_t whole = bits == 8 ? INT8_BLOCK : LARGEST;
    for (int64_t k = 0; k < count; k++) {
        char *p = numbers + 4 * pieces[2 * k];
        size_t left = (size_t)pieces[2 * k + 1];
        while (left > 0) {
            size_t length = left < whole ? left : whole, size = size_of(bits, length);
            if (size == LARGEST) decode_rotated(wire, bits, code, p, length, LARGEST, signs, limit, steps, find);
            else if (size > 0) decode_rotated(wire, bits, code, p, length, size, signs, limit, steps, find);
            else if (length == INT8_BLOCK) decode_int8(code, p, INT8_BLOCK, limit);
            else decode_int8(code, p, length, limit);
            code += SCALE + (size > 0 ? size * (size_t)bits / 8 : length);
            p += 4 * length;
            left -= length;
        }
    }
}

INLINE void encode_bfloat16(const char *numbers, size_t length, char *code)
{
    EACH
    for (size_t i = 0; i < length; i++) put_half(code, i, to_bfloat16(float_at(numbers, i)));
}

INLINE void decode_bfloat16(const char *code, size_t length, char *numbers)
{
    EACH
    for (size_t i = 0; i < length; i++) put_float(numbers, i, from_bfloat16(half_at(code, i)));
}

/* ---- For one level ---- */

#define LEVEL(target, name)                                                                                           \
    target static void encode_##name(const struct wire *wire, const int64_t *pieces, int64_t count,                   \
                                     const char *numbers, uint8_t *code, const uint32_t *signs)                       \
    {                                                                                                                 \
        if (wire->bits == 8)                                                                                          \
            encode_body(wire, 8, pieces, count, numbers, code, signs, steps_##name, quantise_##name);                 \
        else if (wire->bits == 4)                                                                                     \
            encode_body(wire, 4, pieces, count, numbers, code, signs, steps_##name, quantise_##name);                 \
        else                                                                                                          \
            encode_body(wire, 2, pieces, count, numbers, code, signs, steps_##name, quantise_##name);                 \
    }                                                                                                                 \
    target static void decode_##name(const struct wire *wire, const int64_t *pieces, int64_t count,                   \
                                     const uint8_t *code, char *numbers, const uint32_t *signs, float limit)          \
    {                                                                                                                 \
        if (wire->bits == 8)                                                                                          \
            decode_body(wire, 8, pieces, count, code, numbers, signs, limit, steps_##name, look_up_##name);           \
        else if (wire->bits == 4)                                                                                     \
            decode_body(wire, 4, pieces, count, code, numbers, signs, limit, steps_##name, look_up_##name);           \
        else                                                                                                          \
            decode_body(wire, 2, pieces, count, code, numbers, signs, limit, steps_##name, look_up_##name);           \
    }                                                                                                                 \
    target static void narrow_##name(const char *numbers, size_t length, char *code)                                  \
    {                                                                                                                 \
        encode_bfloat16(numbers, length, code);                                                                       \
    }                                                                                                                 \
    target static void widen_##name(const char *code, size_t length, char *numbers)                                   \
    {                                                                                                                 \
        decode_bfloat16(code, length, numbers);                                                                       \
    }

static void steps_baseline(int32_t *v, size_t size) { short_steps_body(v, size); }

static struct fit quantise_baseline(int bits, const int32_t *rotated, size_t size, const int32_t *thresholds,
                                    const int32_t *centroids, uint8_t *indices)
{
    if (bits == 4) return quantise_body(4, rotated, size, thresholds, centroids, indices);
    return quantise_body(2, rotated, size, thresholds, centroids, indices);
}

static void look_up_baseline(int bits, const uint8_t *code, size_t size, const int16_t *centroids, int16_t *out)
{
    if (bits == 4) centroids_body(4, code, size, centroids, out);
    else centroids_body(2, code, size, centroids, out);
}

LEVEL(, baseline)

#if X86
WITH_AVX2 static void steps_avx2(int32_t *v, size_t size) { short_steps_body(v, size); }

WITH_AVX2 static struct fit quantise_avx2(int bits, const int32_t *rotated, size_t size, const int32_t *thresholds,
                                    const int32_t *centroids, uint8_t *indices)
{
    if (bits == 4) return quantise_body(4, rotated, size, thresholds, centroids, indices);
    return quantise_body(2, rotated, size, thresholds, centroids, indices);
}

WITH_AVX2 static void look_up_avx2(int bits, const uint8_t *code, size_t size, const int16_t *centroids, int16_t *out)
{
    if (bits == 4) centroids_body(4, code, size, centroids, out);
    else centroids_body(2, code, size, centroids, out);
}

LEVEL(WITH_AVX2, avx2)
#endif

/* ---- What coders.py calls ---- */

VISIBLE void funcavg_encode(const struct wire *, const int64_t *, int64_t, const void *, void *, int32_t);
VISIBLE void funcavg_decode(const struct wire *, const int64_t *, int64_t, const void *, void *, int32_t, float);

/* Write the code of a row's numbers: of `count` pieces, (begin, length) each; of bfloat16 all are one. With `mean`, it
 * is one of means. */
void funcavg_encode(const struct wire *wire, const int64_t *pieces, int64_t count, const void *numbers, void *code,
                    int32_t mean)
{
    mode before = begin_exact();
    const uint32_t *signs = wire->signs + (mean ? LARGEST : 0);
#if X86
    if (wire->level == AVX2) {
        if (wire->bits == 16) narrow_avx2(numbers, (size_t)pieces[1], code);
        else encode_avx2(wire, pieces, count, numbers, code, signs);
    } else
#endif
    if (wire->bits == 16) narrow_baseline(numbers, (size_t)pieces[1], code);
    else encode_baseline(wire, pieces, count, numbers, code, signs);
    end_exact(before);
}

/* Write the numbers of a row, none above `limit`. */
void funcavg_decode(const struct wire *wire, const int64_t *pieces, int64_t count, const void *code, void *numbers,
                    int32_t mean, float limit)
{
    mode before = begin_exact();
    const uint32_t *signs = wire->signs + (mean ? LARGEST : 0);
#if X86
    if (wire->level == AVX2) {
        if (wire->bits == 16) widen_avx2(code, (size_t)pieces[1], numbers);
        else decode_avx2(wire, pieces, count, code, numbers, signs, limit);
    } else
#endif
    if (wire->bits == 16) widen_baseline(code, (size_t)pieces[1], numbers);
    else decode_baseline(wire, pieces, count, code, numbers, signs, limit);
    end_exact(before);
}
