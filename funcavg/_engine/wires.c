/* Wires in C: the bytes and bits of funcavg/wires/, block by block.
 *
 * Called by coders.py, which knows these functions and `struct wire`. rounded.py, rotated.py and blocks.py say what is
 * written, and why; here it is written in passes over a block that stays in the first-level cache. Whole numbers are
 * integers here and floats there, and both are exact.
 */

#include "kernel.h"

#if !defined(__GNUC__)
#include <math.h>
#endif

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

/* What a scale is made of: the product of rotated numbers and their centroids, and the centroids' squares. */
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
#elif defined(__GNUC__)
    return __builtin_sqrt(x); /* an instruction, with -fno-math-errno */
#else
    return sqrt(x);
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

/* To the largest number rather than to infinity. */
INLINE uint16_t finite_bfloat16(float x)
{
    uint32_t magnitude = bits_of(x) & 0x7fffffff;
    uint16_t rounded = to_bfloat16(x);
    return (uint16_t)(rounded - ((rounded & 0x7fff) == 0x7f80 && magnitude < INFINITE ? 1 : 0));
}

/* ---- int8 ---- */

INLINE void encode_int8(const char *numbers, size_t length, uint8_t *code)
{
    uint32_t top = top_of(numbers, length);
    float scale = float_of(top) / 127.0f;
    if (length == 1) { /* is its scale, and nothing more */
        put_word_of(code, top >= INFINITE ? NOT_A_NUMBER : word_of(numbers));
        return;
    }
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
    if (length == 1) {
        uint32_t u = word_of(code), magnitude = u & 0x7fffffff;
        int over = magnitude < INFINITE && float_of(magnitude) > limit;
        put_word_of(numbers, over ? bits_of(limit) | (u & 0x80000000) : u);
        return;
    }
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

/* Write the indices of centroids, with signs. A byte holds numbers that lie a half, or a quarter, of the block apart. */
INLINE struct fit quantise_body(int bits, const int32_t *rotated, size_t size, const int32_t *thresholds,
                                const int32_t *centroids, uint8_t *code)
{
    const int count = (1 << (bits - 1)) - 1; /* thresholds */
    size_t part = size * (size_t)bits / 8;
    uint8_t indices[LARGEST];
    int32_t gaps[7];
    struct fit fit = {0, 0};
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
    for (size_t i = 0; i < part; i++) {
        uint32_t byte = indices[i] | (uint32_t)indices[i + part] << bits;
        if (bits == 2) byte |= (uint32_t)indices[i + 2 * part] << 4 | (uint32_t)indices[i + 3 * part] << 6;
        code[i] = (uint8_t)byte;
    }
    return fit;
}

/* Write the centroids that indices say, of which `centroids` has those below 0 last. */
INLINE void look_up_body(int bits, const uint8_t *code, size_t size, const int16_t *centroids, int16_t *out)
{
    size_t part = size * (size_t)bits / 8;
    for (size_t i = 0; i < part; i++) {
        uint32_t byte = code[i];
        for (size_t k = 0; k < 8 / (size_t)bits; k++) {
            out[i + k * part] = centroids[byte & ((1 << bits) - 1)];
            byte >>= bits;
        }
    }
}

/* What a level has of its own. */
typedef void short_steps(int32_t *, size_t);
typedef struct fit quantise(int, const int32_t *, size_t, const int32_t *, const int32_t *, uint8_t *);
typedef void look_up(int, const uint8_t *, size_t, const int16_t *, int16_t *);

/* Write the code of a block of `length` numbers, as one of `size`. */
INLINE void encode_rotated(const struct wire *wire, const char *numbers, size_t length, size_t size,
                           const uint32_t *signs, uint8_t *code, short_steps *steps, quantise *write_indices)
{
    float filled[LARGEST];
    int32_t v[LARGEST], thresholds[7];
    uint64_t squares = 0;
    uint32_t top = top_of(numbers, length);
    int shift = 0, count = (1 << (wire->bits - 1)) - 1;
    if (top >= INFINITE || top == 0) {
        put_word_of(code, top == 0 ? 0 : NOT_A_NUMBER);
        memset(code + SCALE, 0, size * (size_t)wire->bits / 8);
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
    for (size_t i = 0; i < size; i++) v[i] = nearest(float_of(word_of(numbers + 4 * i) ^ signs[i]) * factor);
    for (size_t i = 0; i < size; i++) {
        uint32_t magnitude = (uint32_t)(v[i] < 0 ? -v[i] : v[i]);
        squares += (uint64_t)magnitude * magnitude;
    }
    steps(v, size);
    long_steps_int32_t(v, size);
    double root = square_root((double)squares), energy = (double)(size * squares);
    for (int k = 0; k < count; k++) thresholds[k] = (int32_t)(wire->middles[k] * root);
    struct fit fit = write_indices(wire->bits, v, size, thresholds, wire->centroids, code + SCALE);
    double product = (double)fit.product, centroids = (double)fit.squares, scale = energy / product;
    if (scale * scale * centroids > 2 * energy) scale = product / centroids; /* a spike: unbiased is too dear */
    exponent -= shift + PRECISION;
    for (size_t k = size; k > 1; k /= 2) exponent--;
    put_word_of(code, bits_of((float)times_power_of_two(scale, exponent)));
}

INLINE void decode_rotated(const struct wire *wire, const uint8_t *code, char *numbers, size_t length, size_t size,
                           const uint32_t *signs, float limit, short_steps *steps, look_up *find)
{
    int16_t centroids[16] = {0}, narrow[LARGEST]; /* sums of 32 centroids need no more */
    int32_t v[LARGEST];
    int count = 1 << (wire->bits - 1);
    for (int k = 0; k < count; k++) {
        centroids[k] = (int16_t)wire->centroids[k];
        centroids[count + k] = (int16_t)-wire->centroids[k];
    }
    find(wire->bits, code + SCALE, size, centroids, narrow);
    long_steps_int16_t(narrow, size);
    for (size_t i = 0; i < size; i++) v[i] = narrow[i];
    steps(v, size);
    put_times(numbers, v, length, word_of(code), signs, limit);
}

/* ---- For one level ---- */

#define LEVEL(target, name)                                                                                           \
    target static struct fit quantise_##name(int bits, const int32_t *rotated, size_t size,                           \
                                             const int32_t *thresholds, const int32_t *centroids, uint8_t *code)      \
    {                                                                                                                 \
        if (bits == 4) return quantise_of_##name(4, rotated, size, thresholds, centroids, code);                      \
        return quantise_of_##name(2, rotated, size, thresholds, centroids, code);                                     \
    }                                                                                                                 \
    target static void look_up_##name(int bits, const uint8_t *code, size_t size, const int16_t *centroids,           \
                                      int16_t *out)                                                                   \
    {                                                                                                                 \
        if (bits == 4) look_up_of_##name(4, code, size, centroids, out);                                              \
        else look_up_of_##name(2, code, size, centroids, out);                                                        \
    }                                                                                                                 \
    /* A block of `length` numbers as one of `size`; as one of int8, if that is 0. */                                 \
    target static void encode_##name(const struct wire *wire, const char *numbers, size_t length, size_t size,        \
                                     const uint32_t *signs, uint8_t *code)                                            \
    {                                                                                                                 \
        if (size == 0) encode_int8(numbers, length, code);                                                            \
        else encode_rotated(wire, numbers, length, size, signs, code, steps_##name, quantise_##name);                 \
    }                                                                                                                 \
    target static void decode_##name(const struct wire *wire, const uint8_t *code, size_t length, size_t size,        \
                                     const uint32_t *signs, char *numbers, float limit)                               \
    {                                                                                                                 \
        if (size == 0) decode_int8(code, numbers, length, limit);                                                     \
        else decode_rotated(wire, code, numbers, length, size, signs, limit, steps_##name, look_up_##name);           \
    }                                                                                                                 \
    target static void narrow_##name(const char *numbers, size_t length, char *code)                                  \
    {                                                                                                                 \
        EACH                                                                                                          \
        for (size_t i = 0; i < length; i++) put_half(code, i, finite_bfloat16(float_at(numbers, i)));                 \
    }                                                                                                                 \
    target static void widen_##name(const char *code, size_t length, char *numbers)                                   \
    {                                                                                                                 \
        EACH                                                                                                          \
        for (size_t i = 0; i < length; i++) put_float(numbers, i, from_bfloat16(half_at(code, i)));                   \
    }

#define steps_baseline short_steps_body
#define quantise_of_baseline quantise_body
#define look_up_of_baseline look_up_body
LEVEL(, baseline)

#if X86
/* Three steps among eight numbers. In each a number meets the one that lies `stride` off: a, b become b + a, a - b. */
INLINE WITH_AVX2 __m256i three_steps(__m256i v)
{
    const __m256i one = _mm256_setr_epi32(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256i two = _mm256_setr_epi32(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256i four = _mm256_setr_epi32(1, 1, 1, 1, -1, -1, -1, -1);
    v = _mm256_add_epi32(_mm256_shuffle_epi32(v, 0xb1), _mm256_sign_epi32(v, one));
    v = _mm256_add_epi32(_mm256_shuffle_epi32(v, 0x4e), _mm256_sign_epi32(v, two));
    return _mm256_add_epi32(_mm256_permute2x128_si256(v, v, 1), _mm256_sign_epi32(v, four));
}

INLINE WITH_AVX2 void steps_avx2(int32_t *v, size_t size)
{
    for (size_t i = 0; i < size; i += RUN) {
        __m256i *p = (__m256i *)(void *)(v + i);
        __m256i a = three_steps(_mm256_loadu_si256(p)), b = three_steps(_mm256_loadu_si256(p + 1));
        __m256i c = three_steps(_mm256_loadu_si256(p + 2)), d = three_steps(_mm256_loadu_si256(p + 3));
        __m256i ab = _mm256_add_epi32(a, b), cd = _mm256_add_epi32(c, d);
        __m256i a_b = _mm256_sub_epi32(a, b), c_d = _mm256_sub_epi32(c, d);
        _mm256_storeu_si256(p, _mm256_add_epi32(ab, cd));
        _mm256_storeu_si256(p + 1, _mm256_add_epi32(a_b, c_d));
        _mm256_storeu_si256(p + 2, _mm256_sub_epi32(ab, cd));
        _mm256_storeu_si256(p + 3, _mm256_sub_epi32(a_b, c_d));
    }
}

INLINE WITH_AVX2 struct fit quantise_of_avx2(int bits, const int32_t *rotated, size_t size, const int32_t *thresholds,
                                             const int32_t *centroids, uint8_t *code)
{
    const int count = (1 << (bits - 1)) - 1;
    size_t part = size * (size_t)bits / 8;
    __m256i table = _mm256_loadu_si256((const __m256i *)(const void *)centroids), above[7];
    __m256i product = _mm256_setzero_si256(), squares = _mm256_setzero_si256();
    for (int k = 0; k < count; k++) above[k] = _mm256_set1_epi32(thresholds[k]);
    for (size_t i = 0; i < part; i += 16) {
        __m256i bytes[2];
        for (size_t half = 0; half < 2; half++) {
            bytes[half] = _mm256_setzero_si256();
            for (int m = 0; m < 8 / bits; m++) {
                const int32_t *p = rotated + i + 8 * half + (size_t)m * part;
                __m256i r = _mm256_loadu_si256((const __m256i *)(const void *)p), magnitude = _mm256_abs_epi32(r);
                __m256i index = _mm256_setzero_si256();
                for (int k = 0; k < count; k++)
                    index = _mm256_sub_epi32(index, _mm256_cmpgt_epi32(magnitude, above[k]));
                __m256i centroid = _mm256_permutevar8x32_epi32(table, index);
                __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(magnitude, 32), _mm256_srli_epi64(centroid, 32));
                product = _mm256_add_epi64(product, _mm256_add_epi64(_mm256_mul_epu32(magnitude, centroid), odd));
                squares = _mm256_add_epi32(squares, _mm256_madd_epi16(centroid, centroid));
                index = _mm256_or_si256(index, _mm256_slli_epi32(_mm256_srli_epi32(r, 31), bits - 1));
                bytes[half] = _mm256_or_si256(bytes[half], _mm256_slli_epi32(index, m * bits));
            }
        }
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(bytes[0], bytes[1]), 0xd8);
        __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(void *)(code + i), packed);
    }
    uint64_t products[4];
    uint32_t parts[8];
    struct fit fit = {0, 0};
    _mm256_storeu_si256((__m256i *)(void *)products, product);
    _mm256_storeu_si256((__m256i *)(void *)parts, squares);
    for (int k = 0; k < 4; k++) fit.product += products[k];
    for (int k = 0; k < 8; k++) fit.squares += parts[k];
    return fit;
}

/* A centroid's two bytes are looked up one by one. */
INLINE WITH_AVX2 void look_up_of_avx2(int bits, const uint8_t *code, size_t size, const int16_t *centroids,
                                      int16_t *out)
{
    size_t part = size * (size_t)bits / 8;
    uint8_t low[16], high[16];
    for (int k = 0; k < 16; k++) {
        low[k] = (uint8_t)centroids[k];
        high[k] = (uint8_t)(centroids[k] >> 8);
    }
    __m128i lows = _mm_loadu_si128((const __m128i *)(const void *)low), mask = _mm_set1_epi8((1 << bits) - 1);
    __m128i highs = _mm_loadu_si128((const __m128i *)(const void *)high);
    for (size_t i = 0; i < part; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(code + i));
        for (int m = 0; m < 8 / bits; m++) {
            __m128i index = _mm_and_si128(_mm_srli_epi16(bytes, m * bits), mask);
            __m128i a = _mm_shuffle_epi8(lows, index), b = _mm_shuffle_epi8(highs, index);
            __m128i *p = (__m128i *)(void *)(out + i + (size_t)m * part);
            _mm_storeu_si128(p, _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128(p + 1, _mm_unpackhi_epi8(a, b));
        }
    }
}

LEVEL(WITH_AVX2, avx2)
#endif

#if X86
#define ON_LEVEL(name, ...)                                                                                           \
    do {                                                                                                              \
        if (wire->level == AVX2) name##_avx2(__VA_ARGS__);                                                            \
        else name##_baseline(__VA_ARGS__);                                                                            \
    } while (0)
#else
#define ON_LEVEL(name, ...) name##_baseline(__VA_ARGS__)
#endif

/* ---- Rows ---- */

struct block {
    size_t length, size, width; /* numbers; those of what rotates, else 0; bytes of the code */
};

/* The next block of a piece of which `left` numbers are left: blocks.py has the same rule. */
static struct block next(int bits, size_t left)
{
    size_t whole = bits == 8 ? INT8_BLOCK : LARGEST, length = left < whole ? left : whole, size = SMALLEST;
    struct block block = {length, 0, SCALE + (length > 1 ? length : 0)};
    if (bits == 8 || 2 * length < SMALLEST) return block;
    while (size < length) size *= 2;
    block.size = size;
    block.width = SCALE + size * (size_t)bits / 8;
    return block;
}

/* ---- What coders.py calls ---- */

VISIBLE void funcavg_encode(const struct wire *, const int64_t *, int64_t, const void *, void *, int32_t);
VISIBLE void funcavg_decode(const struct wire *, const int64_t *, int64_t, const void *, void *, int32_t, float);

/* Write the code of a row: of `count` pieces of its numbers, (begin, length) each. Those of bfloat16 lie side by side.
 * With `mean` the row is one of means. */
void funcavg_encode(const struct wire *wire, const int64_t *pieces, int64_t count, const void *numbers, void *code,
                    int32_t mean)
{
    mode before = begin_exact();
    const uint32_t *signs = wire->signs + (mean ? LARGEST : 0);
    uint8_t *out = code;
    for (int64_t k = 0; k < count; k++) {
        const char *p = (const char *)numbers + 4 * pieces[2 * k];
        size_t left = (size_t)pieces[2 * k + 1];
        if (wire->bits == 16) {
            ON_LEVEL(narrow, p, left, (char *)out);
            out += 2 * left;
            left = 0;
        }
        while (left > 0) {
            struct block block = next(wire->bits, left);
            ON_LEVEL(encode, wire, p, block.length, block.size, signs, out);
            p += 4 * block.length;
            left -= block.length;
            out += block.width;
        }
    }
    end_exact(before);
}

/* Write the numbers of a row, none above `limit`. */
void funcavg_decode(const struct wire *wire, const int64_t *pieces, int64_t count, const void *code, void *numbers,
                    int32_t mean, float limit)
{
    mode before = begin_exact();
    const uint32_t *signs = wire->signs + (mean ? LARGEST : 0);
    const uint8_t *in = code;
    for (int64_t k = 0; k < count; k++) {
        char *p = (char *)numbers + 4 * pieces[2 * k];
        size_t left = (size_t)pieces[2 * k + 1];
        if (wire->bits == 16) {
            ON_LEVEL(widen, (const char *)in, left, p);
            in += 2 * left;
            left = 0;
        }
        while (left > 0) {
            struct block block = next(wire->bits, left);
            ON_LEVEL(decode, wire, in, block.length, block.size, signs, p, limit);
            p += 4 * block.length;
            left -= block.length;
            in += block.width;
        }
    }
    end_exact(before);
}
