# Memory order, clocks and semaphores: what Python has no words for.
#
# Reached from _slab.py under ``if cython.compiled:``; beside each use stands the
# line that the interpreted engine runs instead.

from libc.string cimport memcmp, memcpy

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <semaphore.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>

    typedef unsigned long long shm_word;

    static inline shm_word shm_load(const shm_word *p)
    { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

    static inline void shm_store(shm_word *p, shm_word v)
    { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

    static inline int shm_cas(shm_word *p, shm_word old, shm_word new_)
    { return __atomic_compare_exchange_n(p, &old, new_, 0,
                                         __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); }

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

    static PyObject *shm_leave = NULL;
    static pid_t shm_leaver = 0;

    static void shm_leave_now(void)
    {
        PyGILState_STATE state;
        PyObject *result;
        if (getpid() != shm_leaver || !Py_IsInitialized()) return;
        state = PyGILState_Ensure();
        result = PyObject_CallObject(shm_leave, NULL);
        if (result == NULL) PyErr_WriteUnraisable(shm_leave);
        Py_XDECREF(result);
        PyGILState_Release(state);
    }

    /* Call a function when this very process calls exit(). */
    static int shm_at_exit(PyObject *function)
    {
        int first = shm_leave == NULL;
        Py_INCREF(function);
        Py_XSETREF(shm_leave, function);
        shm_leaver = getpid();
        return first ? atexit(shm_leave_now) : 0;
    }

    static inline shm_word shm_little(shm_word word)
    {
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        return __builtin_bswap64(word);
    #else
        return word;
    #endif
    }

    /* Sum of n bytes as little-endian 64-bit words modulo 2**64 - 1. */
    static inline shm_word shm_sum(const unsigned char *p, Py_ssize_t n)
    {
        unsigned __int128 total = 0;
        shm_word word, low, sum;
        for (; n >= 8; n -= 8, p += 8) {
            memcpy(&word, p, 8);
            total += shm_little(word);
        }
        if (n) {
            word = 0;
            memcpy(&word, p, (size_t)n);
            total += shm_little(word);
        }
        low = (shm_word)total;
        sum = low + (shm_word)(total >> 64);
        sum += sum < low;
        return sum == ~0ull ? 0 : sum;
    }
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
    int sem_wait "shm_sem_wait"(shm_word sem, shm_word ns)
    shm_word sum_words "shm_sum"(const unsigned char *p, Py_ssize_t n)
    int at_exit "shm_at_exit"(object function) with gil
