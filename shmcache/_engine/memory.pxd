# What the compiled engine calls in C; the headers say what each function does.
#
# The engine uses these under ``if cython.compiled:``; beside each use stands what the
# interpreted engine runs instead.

from libc.string cimport memcmp, memcpy

cdef extern from "atomics.h" nogil:
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

cdef extern from "xxh3.h" nogil:
    bint CHECKSUMS "shm_checksums"
    shm_word xxh3 "shm_xxh3"(const char *p, Py_ssize_t n, shm_word seed)
    shm_word checksum "shm_checksum"(const char *p, Py_ssize_t n)

cdef extern from "exit.h" nogil:
    shm_word on_exit "shm_on_exit"(
        int lock_file, long rows, long count, const char *paths, Py_ssize_t size)
    void has_left "shm_has_left"(shm_word leaver, int lock_file)
