/* SPDX-License-Identifier: MIT
 *
 * Shared barriers of a file: a flush that succeeds covers all that was written before it, whoever made
 * the barrier; and once a barrier has failed, no flush succeeds any more.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"
#include "core/run.h"
#include "leaf/file.h"

#define THREADS 6u
#define SECTOR 512u

static vx_device *file;
static int descriptor;
static _Atomic uint64_t durable[THREADS]; /* what a finished barrier found in the file */
enum loss { NO_LOSS, LOSS, TOLD };
static _Atomic int loss; /* writes are lost from now on; and somebody was told */
static _Atomic bool stop;
static _Atomic uint64_t flushes, barriers, failed;

int __wrap_fdatasync(int fd);
ssize_t __real_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);

static uint64_t value_of(uint32_t thread)
{
    uint64_t value;
    CHECK_EQ(pread(descriptor, &value, sizeof value, thread * SECTOR), sizeof value);
    return value;
}

/* Whether this barrier is the one that is told of the loss. */
static bool is_told(void)
{
    int unknown = LOSS;
    return atomic_compare_exchange_strong(&loss, &unknown, TOLD);
}

/* In place of the kernel's: it makes durable what is there when it begins, and takes a while. When
 * writes are lost, the first barrier that looks is told, at its end; others succeed. */
int __wrap_fdatasync(int fd)
{
    uint64_t found[THREADS];
    CHECK_EQ(fd, descriptor);
    for (uint32_t i = 0; i < THREADS; i++)
        found[i] = value_of(i);
    usleep(300);
    atomic_fetch_add(&barriers, 1);
    if (is_told()) {
        atomic_store(&failed, 1);
        return -1;
    }
    if ((atomic_load(&loss) != NO_LOSS))
        return 0;
    for (uint32_t i = 0; i < THREADS; i++)
        if (found[i] > atomic_load(&durable[i]))
            atomic_store(&durable[i], found[i]);
    return 0;
}

ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    ssize_t n = __real_pwritev2(fd, pieces, count, offset, flags & ~RWF_DSYNC);
    if (!(flags & RWF_DSYNC))
        return n;
    usleep(100);
    if (is_told()) {
        usleep(500); /* the other barrier is quicker to say that all is well */
        atomic_store(&failed, 1);
        return -1;
    }
    uint64_t thread = (uint64_t)offset / SECTOR, value = value_of((uint32_t)thread);
    if (!(atomic_load(&loss) != NO_LOSS) && value > atomic_load(&durable[thread]))
        atomic_store(&durable[thread], value);
    return n;
}

static void *work(void *argument)
{
    uint32_t thread = (uint32_t)(uintptr_t)argument;
    vx_failure failure;
    for (uint64_t value = 1; !atomic_load(&stop); value++) {
        bool told = atomic_load(&failed), fua = thread % 3 == 2;
        int code = vx_transfer(file, VX_WRITE, fua ? VX_FUA : 0, (uint8_t *)&value, sizeof value,
                               thread * SECTOR, &failure);
        if (code == 0 && !fua)
            code = vx_transfer(file, VX_FLUSH, 0, NULL, 0, 0, &failure);
        CHECK(code == 0 || (atomic_load(&loss) != NO_LOSS));
        CHECK(!(told && code == 0));
        if (code != 0)
            break;
        CHECK_GE(atomic_load(&durable[thread]), value);
        atomic_fetch_add(&flushes, 1);
        if (value % 7 == 0)
            usleep(100);
    }
    return NULL;
}

static void once(int milliseconds)
{
    char name[] = "/tmp/vhdx-test-XXXXXX";
    pthread_t threads[THREADS];
    descriptor = mkstemp(name);
    CHECK_GE(descriptor, 0);
    unlink(name);
    CHECK_EQ(ftruncate(descriptor, 1 << 20), 0);
    file = vx_file_create(descriptor, 1 << 20, 0, 9);
    memset((void *)durable, 0, sizeof durable);
    atomic_store(&failed, 0);
    atomic_store(&loss, NO_LOSS);
    atomic_store(&stop, false);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i);
    usleep((useconds_t)milliseconds * 1000);
    atomic_store(&loss, LOSS);
    for (int tenth = 0; tenth < 50 && !atomic_load(&failed); tenth++)
        usleep(100000);
    CHECK_EQ(failed, 1); /* else nobody makes barriers any more */
    usleep(10000);
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQ(vx_device_state(file), VX_E_POISONED);
    vx_device_release(file);
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 4;
    for (int i = 0; i < 5 * seconds; i++)
        once(150);
    CHECK_LT(barriers, flushes); /* they are shared */
    printf("%llu flushes, %llu barriers\n", (unsigned long long)flushes,
           (unsigned long long)barriers);
    return 0;
}
