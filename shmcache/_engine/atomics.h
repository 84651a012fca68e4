/* Memory order, waiting, the clock and semaphores: what Python has no words for.
 *
 * Many processes map the same memory, so the compiler must not move, merge or split the
 * accesses that order everything else.  The atomics are those of GCC and Clang.
 *
 * A semaphore travels through Python as a word, its address; 0 means none.
 */
#ifndef SHMCACHE_ATOMICS_H
#define SHMCACHE_ATOMICS_H

#include <errno.h>
#include <semaphore.h>
#include <stdint.h>
#include <time.h>

typedef unsigned long long shm_word; /* Cython's ulonglong; C11 allows it twice */

/* --- words in shared memory ---------------------------------------------------- */

/* Loads and stores that follow this load in the program stay behind it. */
static inline shm_word shm_load(const shm_word *p)
{ return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

/* Loads and stores that precede this store in the program stay before it. */
static inline void shm_store(shm_word *p, shm_word v)
{ __atomic_store_n(p, v, __ATOMIC_RELEASE); }

/* Compare and swap: store new_ if the word is old; return whether it was. */
static inline int shm_cas(shm_word *p, shm_word old, shm_word new_)
{
#ifdef SHMCACHE_UNPROTECTED
    return *p = new_, 1; /* tools/protection_cost.py measures what protection costs */
#endif
    return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_RELAXED);
}

/* Loads before it stay before loads and stores after it. */
static inline void shm_read_fence(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }

/* Loads and stores before it stay before stores after it. */
static inline void shm_write_fence(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

/* --- the processor ------------------------------------------------------------- */

/* Tell the processor that this is a loop that waits for another one. */
static inline void shm_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Start to load a line of memory that will be read soon. */
static inline void shm_prefetch(const void *p) { __builtin_prefetch(p); }

/* The number of the lowest bit that is set; undefined for 0. */
static inline int shm_lowest_bit(shm_word bits) { return __builtin_ctzll(bits); }

/* CLOCK_MONOTONIC in nanoseconds, as Python's time.monotonic_ns(). */
static inline shm_word shm_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (shm_word)t.tv_sec * 1000000000ull + (shm_word)t.tv_nsec;
}

/* --- semaphores ---------------------------------------------------------------- */

/* Open a named semaphore that exists; 0 if it cannot be opened, see errno. */
static inline shm_word shm_sem_open(const char *name)
{
    sem_t *sem = sem_open(name, 0);
    return sem == SEM_FAILED ? 0 : (shm_word)(uintptr_t)sem;
}

static inline void shm_sem_close(shm_word sem) { sem_close((sem_t *)(uintptr_t)sem); }

static inline void shm_sem_post(shm_word sem)
{ if (sem) sem_post((sem_t *)(uintptr_t)sem); }

/* Take a permit if there is one; return whether there was. */
static inline int shm_sem_try(shm_word sem)
{ return sem && sem_trywait((sem_t *)(uintptr_t)sem) == 0; }

/* The number of permits; -1 if the semaphore cannot be asked. */
static inline int shm_sem_value(shm_word sem)
{
    int value = -1;
    if (sem) sem_getvalue((sem_t *)(uintptr_t)sem, &value);
    return value;
}

/* Wait for a permit for at most so many nanoseconds.
 * 1: the caller has the permit; 0: the time is up; -1: a signal arrived. */
static inline int shm_sem_wait(shm_word sem, shm_word ns)
{
    struct timespec t;
    if (!sem) return 0;
    clock_gettime(CLOCK_REALTIME, &t); /* the clock by which sem_timedwait waits */
    ns += (shm_word)t.tv_nsec;
    t.tv_sec += (time_t)(ns / 1000000000ull);
    t.tv_nsec = (long)(ns % 1000000000ull);
    if (sem_timedwait((sem_t *)(uintptr_t)sem, &t) == 0) return 1;
    return errno == EINTR ? -1 : 0;
}

#endif
