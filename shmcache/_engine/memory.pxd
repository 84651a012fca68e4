# Memory order, clocks, semaphores and the end of a process: what Python has no words for.
#
# Reached from _slab.py under ``if cython.compiled:``; beside each use stands the
# line that the interpreted engine runs instead.

from libc.string cimport memcmp, memcpy

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <semaphore.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <time.h>
    #include <unistd.h>

    typedef unsigned long long shm_word;

    static inline shm_word shm_load(const shm_word *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

    static inline void shm_store(shm_word *p, shm_word v)
    { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

    static inline int shm_cas(shm_word *p, shm_word old, shm_word new_)
    {
    #ifdef SHMCACHE_UNPROTECTED
        return *p = new_, 1; /* for tools/protection_cost.py */
    #endif
        return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST,
                                           __ATOMIC_RELAXED);
    }

    /* Loads before it stay before loads after it. */
    static inline void shm_read_fence(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    /* Stores before it are seen before stores after it. */
    static inline void shm_write_fence(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

    static inline void shm_pause(void)
    {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }

    static inline void shm_prefetch(const void *p) { __builtin_prefetch(p); }

    static inline int shm_lowest_bit(shm_word bits) { return __builtin_ctzll(bits); }

    static inline shm_word shm_now(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (shm_word)t.tv_sec * 1000000000ull + (shm_word)t.tv_nsec;
    }

    static inline shm_word shm_sem_open(const char *name)
    {
        sem_t *sem = sem_open(name, 0);
        return sem == SEM_FAILED ? 0 : (shm_word)(uintptr_t)sem;
    }
    static inline void shm_sem_close(shm_word sem) { sem_close((sem_t *)(uintptr_t)sem); }
    static inline void shm_sem_post(shm_word sem) { if (sem) sem_post((sem_t *)(uintptr_t)sem); }
    static inline int shm_sem_try(shm_word sem)
    { return sem && sem_trywait((sem_t *)(uintptr_t)sem) == 0; }

    static inline int shm_sem_value(shm_word sem)
    {
        int value = -1;
        if (sem) sem_getvalue((sem_t *)(uintptr_t)sem, &value);
        return value;
    }

    /* 1: have the permit; 0: the time is up; -1: a signal came. */
    static inline int shm_sem_wait(shm_word sem, shm_word ns)
    {
        struct timespec t;
        if (!sem) return 0;
        clock_gettime(CLOCK_REALTIME, &t);
        ns += (shm_word)t.tv_nsec;
        t.tv_sec += (time_t)(ns / 1000000000ull);
        t.tv_nsec = (long)(ns % 1000000000ull);
        if (sem_timedwait((sem_t *)(uintptr_t)sem, &t) == 0) return 1;
        return errno == EINTR ? -1 : 0;
    }

    /* What a process leaves that ends by exit() without finalizing Python: uWSGI's first
       process, and its workers when they are told to end in the midst of a request, in
       a signal handler.  So these are system calls and nothing else. */
    struct shm_leaver {
        struct shm_leaver *next;
        pid_t pid;
        int lease;  /* descriptor; -1: the process has left */
        off_t rows, row_count;  /* bytes of the lease file; byte 0 is the admin lock */
        char *paths;  /* the lease file's first; an empty one ends them */
    };
    static struct shm_leaver *shm_leavers = NULL;

    static int shm_lock_bytes(int fd, int how, short kind, off_t start, off_t length)
    {
        struct flock lock;
        memset(&lock, 0, sizeof lock);
        lock.l_type = kind;
        lock.l_whence = SEEK_SET;
        lock.l_start = start;
        lock.l_len = length;
        return fcntl(fd, how, &lock) == 0 && (how != F_GETLK || lock.l_type == F_UNLCK);
    }

    static void shm_leave(const struct shm_leaver *l)
    {
        const struct timespec pause = {0, 1000000};
        struct stat named, ours;
        const char *path;
        int tries = 0;
        shm_lock_bytes(l->lease, F_SETLK, F_UNLCK, l->rows, l->row_count);
        while (!shm_lock_bytes(l->lease, F_SETLK, F_WRLCK, 0, 1)) {
            if (++tries > 1000) return;
            nanosleep(&pause, NULL);
        }
        if (stat(l->paths, &named) == 0 && fstat(l->lease, &ours) == 0
            && named.st_dev == ours.st_dev && named.st_ino == ours.st_ino
            && shm_lock_bytes(l->lease, F_GETLK, F_WRLCK, l->rows, l->row_count))
            for (path = l->paths; *path; path += strlen(path) + 1) unlink(path);
        shm_lock_bytes(l->lease, F_SETLK, F_UNLCK, 0, 1);
    }

    static void shm_leave_all(void)
    {
        const struct shm_leaver *l;
        for (l = shm_leavers; l != NULL; l = l->next)
            if (l->lease >= 0 && l->pid == getpid()) shm_leave(l);
    }

    static shm_word shm_on_exit(int lease, long rows, long count, const char *paths,
                                Py_ssize_t size)
    {
        struct shm_leaver *l = shm_leavers;
        while (l != NULL && (l->lease >= 0 && l->pid == getpid())) l = l->next;
        if (l == NULL) {
            l = calloc(1, sizeof *l);
            if (l == NULL) return 0;
            if (shm_leavers == NULL) atexit(shm_leave_all);
            l->next = shm_leavers;
            l->lease = -1;
            shm_leavers = l;
        }
        free(l->paths);
        l->paths = calloc(1, (size_t)size + 1);
        if (l->paths == NULL) return 0;
        memcpy(l->paths, paths, (size_t)size);
        l->rows = rows;
        l->row_count = count;
        l->pid = getpid();
        l->lease = lease;
        return (shm_word)(uintptr_t)l;
    }

    static void shm_has_left(shm_word leaver, int lease)
    {
        struct shm_leaver *l = (struct shm_leaver *)(uintptr_t)leaver;
        if (l->pid == getpid() && l->lease == lease) l->lease = -1;
    }

    static inline shm_word shm_little(shm_word word)
    {
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        return __builtin_bswap64(word);
    #else
        return word;
    #endif
    }

    /* XXH3 of up to 128 bytes, 64 bits of it (by its specification in
       https://github.com/Cyan4973/xxHash): a call of the Python package costs half as much
       as all the rest of a lookup in warm caches.  What is longer goes there. */
    static const shm_word shm_secret[16] = {
        0xBE4BA423396CFEB8ull, 0x1CAD21F72C81017Cull, 0xDB979083E96DD4DEull,
        0x1F67B3B7A4A44072ull, 0x78E5C0CC4EE679CBull, 0x2172FFCC7DD05A82ull,
        0x8E2443F7744608B8ull, 0x4C263A81E69035E0ull, 0xCB00C391BB52283Cull,
        0xA32E531B8B65D088ull, 0x4EF90DA297486471ull, 0xD8ACDEA946EF1938ull,
        0x3F349CE33F76FAA8ull, 0x1D4F0BC7C7BBDCF9ull, 0x3159B4CD4BE0518Aull,
        0x647378D9C97E9FC8ull};

    static inline shm_word shm_read64(const unsigned char *p)
    { shm_word w; memcpy(&w, p, 8); return shm_little(w); }

    static inline shm_word shm_read32(const unsigned char *p)
    { return p[0] | (shm_word)p[1] << 8 | (shm_word)p[2] << 16 | (shm_word)p[3] << 24; }

    static inline shm_word shm_fold(shm_word a, shm_word b)
    {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (shm_word)product ^ (shm_word)(product >> 64);
    }

    /* 16 bytes with two words of the secret, of which ``word`` is the first. */
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

    static inline shm_word shm_xxh3(const char *bytes, Py_ssize_t n, shm_word seed)
    {
        const unsigned char *p = (const unsigned char *)bytes;
        const shm_word *s = shm_secret;
        shm_word h, lo, hi;
        if (n > 16) {
            h = (shm_word)n * 0x9E3779B185EBCA87ull;
            if (n > 96) h += shm_mix(p + 48, 12, seed) + shm_mix(p + n - 64, 14, seed);
            if (n > 64) h += shm_mix(p + 32, 8, seed) + shm_mix(p + n - 48, 10, seed);
            if (n > 32) h += shm_mix(p + 16, 4, seed) + shm_mix(p + n - 32, 6, seed);
            h += shm_mix(p, 0, seed) + shm_mix(p + n - 16, 2, seed);
            return shm_avalanche(h);
        }
        if (n > 8) {
            lo = shm_read64(p) ^ ((s[3] ^ s[4]) + seed);
            hi = shm_read64(p + n - 8) ^ ((s[5] ^ s[6]) - seed);
            return shm_avalanche((shm_word)n + __builtin_bswap64(lo) + hi
                                 + shm_fold(lo, hi));
        }
        if (n >= 4) {
            seed ^= (shm_word)__builtin_bswap32((uint32_t)seed) << 32;
            h = (shm_read32(p + n - 4) + (shm_read32(p) << 32)) ^ ((s[1] ^ s[2]) - seed);
            h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
            h *= 0x9FB21C651E98DF25ull;
            h ^= (h >> 35) + (shm_word)n;
            h *= 0x9FB21C651E98DF25ull;
            return h ^ h >> 28;
        }
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

    /* Without what only damage makes necessary, for tools/protection_cost.py. */
    #ifdef SHMCACHE_UNPROTECTED
    enum { shm_checksums = 0 };
    #else
    enum { shm_checksums = 1 };
    #endif

    static inline shm_word shm_checksum(const char *p, Py_ssize_t n)
    { return shm_checksums ? shm_xxh3(p, n, 0) : 0; }
    """
    ctypedef unsigned long long shm_word
    shm_word load "shm_load"(const shm_word *p)
    void store "shm_store"(shm_word *p, shm_word v)
    bint cas "shm_cas"(shm_word *p, shm_word old, shm_word new)
    void read_fence "shm_read_fence"()
    void write_fence "shm_write_fence"()
    void pause "shm_pause"()
    void prefetch "shm_prefetch"(const void *p)
    int lowest_bit "shm_lowest_bit"(shm_word bits)
    shm_word now_ns "shm_now"()
    shm_word sem_open "shm_sem_open"(const char *name)
    void sem_close "shm_sem_close"(shm_word sem)
    void sem_post "shm_sem_post"(shm_word sem)
    bint sem_try "shm_sem_try"(shm_word sem)
    int sem_value "shm_sem_value"(shm_word sem)
    int sem_wait "shm_sem_wait"(shm_word sem, shm_word ns)
    bint CHECKSUMS "shm_checksums"
    shm_word xxh3 "shm_xxh3"(const char *p, Py_ssize_t n, shm_word seed)
    shm_word checksum "shm_checksum"(const char *p, Py_ssize_t n)
    shm_word on_exit "shm_on_exit"(
        int lease, long rows, long count, const char *paths, Py_ssize_t size)
    void has_left "shm_has_left"(shm_word leaver, int lease)
