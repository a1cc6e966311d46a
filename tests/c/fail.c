/* SPDX-License-Identifier: MIT
 *
 * Preloaded into a process (LD_PRELOAD): wraps the system calls of the file device and makes a
 * chosen one fail.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { NONE, EIO_ONCE, ENOSPC_ONCE, SHORT_ONCE };

static atomic_int fail_at, fail_mode, calls, fired_kind;
enum kind { READ = 1, WRITE, BARRIER, ALLOCATE, TRUNCATE, SEEK };

/* Makes call number `at` fail in this mode; the next call is number 1. 0: no call fails. */
void fail_arm(int at, int mode);
int fail_calls(void);
int fail_fired(void);

void fail_arm(int at, int mode)
{
    atomic_store(&calls, 0);
    atomic_store(&fired_kind, 0);
    atomic_store(&fail_mode, mode);
    atomic_store(&fail_at, at);
}

int fail_calls(void)
{
    return atomic_load(&calls);
}

/* Returns the kind of the call that failed; 0: none has failed yet. */
int fail_fired(void)
{
    return atomic_load(&fired_kind);
}

static enum mode turn(enum kind kind)
{
    if (atomic_fetch_add(&calls, 1) + 1 != atomic_load(&fail_at))
        return NONE;
    atomic_store(&fired_kind, (int)kind);
    int mode = atomic_load(&fail_mode);
    if (mode == EIO_ONCE)
        errno = EIO;
    else if (mode == ENOSPC_ONCE)
        errno = ENOSPC;
    else
        errno = EINTR; /* SHORT_ONCE, for calls that cannot be short */
    return (enum mode)mode;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t preadv2(int fd, const struct iovec *piece, int count, off_t offset, int flags)
{
    enum mode mode = turn(READ);
    if (mode == SHORT_ONCE && piece->iov_len >= 1024) {
        struct iovec half = {piece->iov_base, piece->iov_len / 1024 * 512};
        return REAL(preadv2)(fd, &half, 1, offset, flags);
    }
    return mode != NONE ? -1 : REAL(preadv2)(fd, piece, count, offset, flags);
}

ssize_t pwritev2(int fd, const struct iovec *piece, int count, off_t offset, int flags)
{
    enum mode mode = turn(WRITE);
    if (mode != NONE && piece->iov_len >= 1024) {
        /* Write the first half; then fail, or report a short write. */
        int error = errno;
        struct iovec half = {piece->iov_base, piece->iov_len / 1024 * 512};
        ssize_t done = REAL(pwritev2)(fd, &half, 1, offset, flags);
        errno = error;
        return mode == SHORT_ONCE ? done : -1;
    }
    return mode != NONE ? -1 : REAL(pwritev2)(fd, piece, count, offset, flags);
}

int fdatasync(int fd)
{
    return turn(BARRIER) != NONE ? -1 : REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    return turn(BARRIER) != NONE ? -1 : REAL(fsync)(fd);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return turn(ALLOCATE) != NONE ? -1 : REAL(fallocate)(fd, mode, offset, length);
}

int ftruncate(int fd, off_t size)
{
    return turn(TRUNCATE) != NONE ? -1 : REAL(ftruncate)(fd, size);
}

off_t lseek(int fd, off_t offset, int whence)
{
    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return REAL(lseek)(fd, offset, whence);
    return turn(SEEK) != NONE ? -1 : REAL(lseek)(fd, offset, whence);
}
