/* Leaving a segment when the process ends by exit() without finalizing Python.
 *
 * Problem: uWSGI's first process ends this way, and so do its workers if they are told
 * to end in the middle of a request.  Python's atexit functions do not run then, and
 * the files of a cache that no process uses any more would stay.
 *
 * Mechanism: each attached segment has a leaver, and one function, registered with C's
 * atexit(), goes through all of them.  For each it gives up this process's locks on
 * worker rows, and if no other process has one, it removes the files.  It does so under
 * the admin lock (byte 0 of the lock file), and only if the lock file's name still
 * refers to the file that is open here: otherwise a newer segment has the name.
 *
 * exit() may be called in a signal handler, in the middle of anything.  So what runs
 * there makes system calls and nothing else, and a leaver is never freed: an empty one
 * is used again.  All other fields are set before `lock_file`, which makes the leaver
 * count.
 *
 * Death in the middle: the kernel gives the locks back, and the next process that
 * cleans up finds the files unused.
 *
 * The list is static, so only one compilation unit of an extension may include this.
 */
#ifndef SHMCACHE_EXIT_H
#define SHMCACHE_EXIT_H

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long shm_word; /* Cython's ulonglong; C11 allows it twice */

struct shm_leaver {
    struct shm_leaver *next;
    pid_t pid;     /* in a forked child, the leavers of its parent do not count */
    int lock_file; /* its descriptor; -1: there is nothing to leave */
    off_t rows, row_count; /* the bytes of the lock file that stand for worker rows */
    char *paths;   /* each ends with a zero byte; the lock file's path is the first, and
                      an empty one ends the list */
};
static struct shm_leaver *shm_leavers = NULL;

/* Set, release or test (`how`) locks on bytes of a file; return whether it worked, or
   whether no other process has one. */
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

/* Whether a path still refers to the file of a descriptor. */
static int shm_still_named(const char *path, int fd)
{
    struct stat named, ours;
    return stat(path, &named) == 0 && fstat(fd, &ours) == 0
           && named.st_dev == ours.st_dev && named.st_ino == ours.st_ino;
}

static void shm_leave(const struct shm_leaver *l)
{
    const struct timespec pause = {0, 1000000};
    const char *path;
    int tries = 0;
    shm_lock_bytes(l->lock_file, F_SETLK, F_UNLCK, l->rows, l->row_count);
    while (!shm_lock_bytes(l->lock_file, F_SETLK, F_WRLCK, 0, 1)) {
        if (++tries > 1000) return; /* a second is long enough to hold up an exit */
        nanosleep(&pause, NULL);
    }
    if (shm_still_named(l->paths, l->lock_file)
        && shm_lock_bytes(l->lock_file, F_GETLK, F_WRLCK, l->rows, l->row_count))
        for (path = l->paths; *path; path += strlen(path) + 1) unlink(path);
    shm_lock_bytes(l->lock_file, F_SETLK, F_UNLCK, 0, 1);
}

static void shm_leave_all(void)
{
    const struct shm_leaver *l;
    for (l = shm_leavers; l != NULL; l = l->next)
        if (l->lock_file >= 0 && l->pid == getpid()) shm_leave(l);
}

/* Make this process leave a segment at its exit.
 *
 * lock_file: descriptor of the lock file; rows, count: its bytes that stand for worker
 * rows; paths, size: the files to remove, as in shm_leaver.  Returns the leaver, to be
 * given to shm_has_left(); 0 if there is no memory. */
static shm_word shm_on_exit(int lock_file, long rows, long count, const char *paths,
                            ptrdiff_t size)
{
    struct shm_leaver *l = shm_leavers;
    while (l != NULL && l->lock_file >= 0 && l->pid == getpid()) l = l->next;
    if (l == NULL) {
        l = calloc(1, sizeof *l);
        if (l == NULL) return 0;
        if (shm_leavers == NULL) atexit(shm_leave_all);
        l->next = shm_leavers;
        l->lock_file = -1;
        shm_leavers = l;
    }
    free(l->paths);
    l->paths = calloc(1, (size_t)size + 1);
    if (l->paths == NULL) return 0;
    memcpy(l->paths, paths, (size_t)size);
    l->rows = rows;
    l->row_count = count;
    l->pid = getpid();
    l->lock_file = lock_file;
    return (shm_word)(uintptr_t)l;
}

/* Note that this process has left a segment by itself. */
static void shm_has_left(shm_word leaver, int lock_file)
{
    struct shm_leaver *l = (struct shm_leaver *)(uintptr_t)leaver;
    if (l->pid == getpid() && l->lock_file == lock_file) l->lock_file = -1;
}

#endif
