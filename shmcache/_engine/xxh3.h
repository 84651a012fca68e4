/* XXH3, 64 bits, of up to 128 bytes, and the checksum of short values.
 *
 * This is written after the specification in https://github.com/Cyan4973/xxHash and
 * computes what the Python package xxhash computes.  It is here because a call of that
 * package takes half as long as all the rest of a lookup in warm caches.  The package
 * hashes what is longer.
 */
#ifndef SHMCACHE_XXH3_H
#define SHMCACHE_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef unsigned long long shm_word; /* Cython's ulonglong; C11 allows it twice */

/* The first 128 bytes of the specification's default secret, as little-endian words. */
static const shm_word shm_secret[16] = {
    0xBE4BA423396CFEB8ull, 0x1CAD21F72C81017Cull, 0xDB979083E96DD4DEull,
    0x1F67B3B7A4A44072ull, 0x78E5C0CC4EE679CBull, 0x2172FFCC7DD05A82ull,
    0x8E2443F7744608B8ull, 0x4C263A81E69035E0ull, 0xCB00C391BB52283Cull,
    0xA32E531B8B65D088ull, 0x4EF90DA297486471ull, 0xD8ACDEA946EF1938ull,
    0x3F349CE33F76FAA8ull, 0x1D4F0BC7C7BBDCF9ull, 0x3159B4CD4BE0518Aull,
    0x647378D9C97E9FC8ull};

/* All words of the input are read as little-endian numbers. */
static inline shm_word shm_read64(const unsigned char *p)
{
    shm_word w;
    memcpy(&w, p, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(w);
#else
    return w;
#endif
}

static inline shm_word shm_read32(const unsigned char *p)
{ return p[0] | (shm_word)p[1] << 8 | (shm_word)p[2] << 16 | (shm_word)p[3] << 24; }

/* The product's upper half and lower half, by exclusive or. */
static inline shm_word shm_fold(shm_word a, shm_word b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (shm_word)product ^ (shm_word)(product >> 64);
}

/* Mix 16 bytes with two words of the secret, beginning with word number `word`. */
static inline shm_word shm_mix(const unsigned char *p, int word, shm_word seed)
{
    return shm_fold(shm_read64(p) ^ (shm_secret[word] + seed),
                    shm_read64(p + 8) ^ (shm_secret[word + 1] - seed));
}

static inline shm_word shm_avalanche(shm_word h)
{
    h ^= h >> 37;
    h *= 0x165667919E3779F9ull;
    return h ^ h >> 32;
}

/* 0 to 3 bytes. */
static inline shm_word shm_xxh3_tiny(const unsigned char *p, ptrdiff_t n, shm_word seed)
{
    const shm_word *s = shm_secret;
    shm_word h;
    if (n > 0) {
        h = (shm_word)p[0] << 16 | (shm_word)p[n >> 1] << 24 | p[n - 1]
            | (shm_word)n << 8;
        h ^= ((s[0] & 0xFFFFFFFFull) ^ s[0] >> 32) + seed;
    } else {
        h = seed ^ s[7] ^ s[8];
    }
    h ^= h >> 33;
    h *= 0xC2B2AE3D27D4EB4Full;
    h ^= h >> 29;
    h *= 0x165667B19E3779F9ull;
    return h ^ h >> 32;
}

/* 4 to 8 bytes. */
static inline shm_word shm_xxh3_word(const unsigned char *p, ptrdiff_t n, shm_word seed)
{
    const shm_word *s = shm_secret;
    shm_word h;
    seed ^= (shm_word)__builtin_bswap32((uint32_t)seed) << 32;
    h = (shm_read32(p + n - 4) + (shm_read32(p) << 32)) ^ ((s[1] ^ s[2]) - seed);
    h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
    h *= 0x9FB21C651E98DF25ull;
    h ^= (h >> 35) + (shm_word)n;
    h *= 0x9FB21C651E98DF25ull;
    return h ^ h >> 28;
}

/* 9 to 16 bytes. */
static inline shm_word shm_xxh3_two(const unsigned char *p, ptrdiff_t n, shm_word seed)
{
    const shm_word *s = shm_secret;
    shm_word lo = shm_read64(p) ^ ((s[3] ^ s[4]) + seed);
    shm_word hi = shm_read64(p + n - 8) ^ ((s[5] ^ s[6]) - seed);
    return shm_avalanche((shm_word)n + __builtin_bswap64(lo) + hi + shm_fold(lo, hi));
}

/* 17 to 128 bytes: pairs of 16 bytes, from both ends towards the middle. */
static inline shm_word shm_xxh3_long(const unsigned char *p, ptrdiff_t n, shm_word seed)
{
    shm_word h = (shm_word)n * 0x9E3779B185EBCA87ull;
    if (n > 96) h += shm_mix(p + 48, 12, seed) + shm_mix(p + n - 64, 14, seed);
    if (n > 64) h += shm_mix(p + 32, 8, seed) + shm_mix(p + n - 48, 10, seed);
    if (n > 32) h += shm_mix(p + 16, 4, seed) + shm_mix(p + n - 32, 6, seed);
    h += shm_mix(p, 0, seed) + shm_mix(p + n - 16, 2, seed);
    return shm_avalanche(h);
}

/* XXH3 of n bytes, where n is from 0 to 128. */
static inline shm_word shm_xxh3(const char *bytes, ptrdiff_t n, shm_word seed)
{
    const unsigned char *p = (const unsigned char *)bytes;
    if (n > 16) return shm_xxh3_long(p, n, seed);
    if (n > 8) return shm_xxh3_two(p, n, seed);
    if (n >= 4) return shm_xxh3_word(p, n, seed);
    return shm_xxh3_tiny(p, n, seed);
}

/* Whether values have checksums at all: tools/protection_cost.py measures what they
   cost. */
#ifdef SHMCACHE_UNPROTECTED
enum { shm_checksums = 0 };
#else
enum { shm_checksums = 1 };
#endif

/* The part of a value's checksum that depends on its bytes, of which there are at most
   128. */
static inline shm_word shm_checksum(const char *p, ptrdiff_t n)
{ return shm_checksums ? shm_xxh3(p, n, 0) : 0; }

#endif
