/* SPDX-License-Identifier: MIT */
#include "leaf/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/pool.h"

typedef struct file_device {
    vx_device device;
    int fd;
    uint32_t flags;
    _Atomic uint32_t slow_writes; /* NOWAIT writes still to be sent to the pool */
    _Atomic bool size_changed;
    _Atomic bool nowait_refused; /* the file system does not support RWF_NOWAIT */
    _Atomic uint64_t barriers;

    /* How many changes have ended, failed ones too. It starts at 1, so the first flush covers what was
     * written before the open. */
    _Atomic uint64_t changes;
    pthread_rwlock_t errors; /* held for reading by FUA writes: a lost write is reported once, to either */
    pthread_mutex_t lock;
    pthread_cond_t synchronised;
    uint64_t durable; /* under lock: the changes that a finished barrier covers */
    bool in_barrier;  /* under lock */
    uint64_t finished; /* under lock: barriers that have ended */
} file_device;

#define ZERO_PIECE 65536u
static const uint8_t zeros[ZERO_PIECE];

static int code_of(int os_error)
{
    switch (os_error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return VX_E_NOSPACE;
    case ENOMEM:
        return VX_E_NOMEM;
    case EROFS:
    case EBADF:
        return VX_E_READONLY;
    default:
        return VX_E_IO;
    }
}

static int fail_here(file_device *file, vx_request *request, uint64_t offset)
{
    int os_error = errno;
    return vx_fail(&file->device, request, code_of(os_error), os_error, offset);
}

static int file_read(file_device *file, vx_request *request)
{
    bool nowait = (request->flags & VX_NOWAIT) && !(file->flags & VX_FILE_MEMORY);
    uint64_t done = 0;
    if (nowait && atomic_load_explicit(&file->nowait_refused, memory_order_relaxed))
        return VX_AGAIN;
    while (done < request->length) {
        struct iovec piece = {request->buffer + done, request->length - done};
        ssize_t n = preadv2(file->fd, &piece, 1, (off_t)(request->offset + done),
                            nowait ? RWF_NOWAIT : 0);
        if (n > 0) {
            done += (uint64_t)n;
        } else if (n == 0) {
            /* The file is shorter than the device: another program truncated it. */
            return vx_fail(&file->device, request, VX_E_IO, 0, request->offset + done);
        } else if (errno == EAGAIN && nowait) {
            return VX_AGAIN;
        } else if (errno == EOPNOTSUPP && nowait) {
            atomic_store(&file->nowait_refused, true);
            return VX_AGAIN;
        } else if (errno != EINTR) {
            return fail_here(file, request, request->offset + done);
        }
    }
    return vx_succeed(request);
}

/* Raised when a change has ended, so that a barrier that begins later covers it. */
static void changed(file_device *file)
{
    atomic_fetch_add(&file->changes, 1);
}

/* Every later request fails. The kernel says only once that it lost a write. Never NOSPACE: that
 * would promise that the device is usable. */
static void fail_barrier(file_device *file, vx_request *request, uint64_t offset)
{
    vx_fail(&file->device, request, VX_E_IO, errno, offset);
    vx_device_set_state(&file->device, VX_E_POISONED);
}

static int put(file_device *file, vx_request *request, const uint8_t *data, uint64_t length,
               uint64_t offset, int flags)
{
    for (uint64_t done = 0; done < length;) {
        struct iovec piece = {(uint8_t *)(uintptr_t)data + done, length - done};
        ssize_t n = pwritev2(file->fd, &piece, 1, (off_t)(offset + done), flags);
        if (n >= 0) {
            done += (uint64_t)n;
        } else if (errno != EINTR) {
            if (flags & RWF_DSYNC) /* the space is allocated, so the barrier failed */
                fail_barrier(file, request, offset + done);
            else
                fail_here(file, request, offset + done);
            return request->result;
        }
    }
    return VX_OK;
}

static int allocate(file_device *file, int mode, vx_request *request)
{
    int n;
    do
        n = fallocate(file->fd, mode, (off_t)request->offset, (off_t)request->length);
    while (n != 0 && errno == EINTR);
    return n;
}

/* A write that is a barrier for its data. The kernel reports a lost write once for each open file: to
 * this write or to a barrier that runs beside it. So neither succeeds before the other has said
 * whether it failed. */
static int put_durably(file_device *file, vx_request *request)
{
    pthread_rwlock_rdlock(&file->errors);
    int code = put(file, request, request->buffer, request->length, request->offset, RWF_DSYNC);
    pthread_rwlock_unlock(&file->errors);
    atomic_fetch_add(&file->barriers, 1);
    if (code != VX_OK)
        return code;
    pthread_mutex_lock(&file->lock);
    for (uint64_t finished = file->finished; file->in_barrier && file->finished == finished;)
        pthread_cond_wait(&file->synchronised, &file->lock);
    pthread_mutex_unlock(&file->lock);
    int state = vx_device_state(&file->device);
    if (state != 0)
        vx_fail(&file->device, request, state, 0, request->offset);
    return state;
}

static int file_write(file_device *file, vx_request *request)
{
    bool fua = request->flags & VX_FUA, nowait = request->flags & VX_NOWAIT;
    uint64_t began = 0;
    if (nowait) {
        uint32_t slow = atomic_load_explicit(&file->slow_writes, memory_order_relaxed);
        if (fua)
            return VX_AGAIN;
        if (slow > 0) {
            atomic_store_explicit(&file->slow_writes, slow - 1, memory_order_relaxed);
            return VX_AGAIN;
        }
        began = vx_now_ns();
    }
    if (file->flags & VX_FILE_ALLOCATE && request->length >= VX_LARGE_WRITE)
        (void)allocate(file, FALLOC_FL_KEEP_SIZE, request); /* the write reports any error */
    /* FUA writes twice. The first write allocates the space, so a failure of the second is a failed
     * barrier. */
    int code = put(file, request, request->buffer, request->length, request->offset, 0);
    if (code == VX_OK && fua)
        code = put_durably(file, request);
    else
        changed(file);
    if (code != VX_OK)
        return VX_DONE;
    if (nowait && vx_now_ns() - began > VX_SLOW_WRITE_NS)
        atomic_store_explicit(&file->slow_writes, 64, memory_order_relaxed);
    return vx_succeed(request);
}

static bool synchronise(file_device *file)
{
    atomic_fetch_add(&file->barriers, 1);
    bool whole = atomic_exchange(&file->size_changed, false);
    int n;
    do
        n = whole ? fsync(file->fd) : fdatasync(file->fd);
    while (n != 0 && errno == EINTR); /* interrupted; nothing was lost */
    return n == 0;
}

static int file_barrier(file_device *file, vx_request *request)
{
    if (file->flags & VX_FILE_READ_ONLY)
        return vx_succeed(request);
    uint64_t wanted = atomic_load(&file->changes);
    pthread_mutex_lock(&file->lock);
    while (file->durable < wanted && file->in_barrier)
        pthread_cond_wait(&file->synchronised, &file->lock);
    int state = vx_device_state(&file->device); /* set if the barrier that was waited for failed */
    if (state != 0 || file->durable >= wanted) {
        pthread_mutex_unlock(&file->lock);
        return state != 0 ? vx_fail(&file->device, request, state, 0, 0) : vx_succeed(request);
    }
    file->in_barrier = true;
    pthread_mutex_unlock(&file->lock);
    uint64_t covered = atomic_load(&file->changes);
    bool succeeded = synchronise(file);
    if (!succeeded)
        fail_barrier(file, request, 0); /* before anybody who waits looks at the state */
    pthread_rwlock_wrlock(&file->errors); /* a FUA write may have been told of a loss in its place */
    pthread_rwlock_unlock(&file->errors);
    state = vx_device_state(&file->device);
    pthread_mutex_lock(&file->lock);
    file->in_barrier = false;
    file->finished++;
    if (state == 0)
        file->durable = covered;
    pthread_cond_broadcast(&file->synchronised);
    pthread_mutex_unlock(&file->lock);
    if (!succeeded)
        return VX_DONE;
    return state != 0 ? vx_fail(&file->device, request, state, 0, 0) : vx_succeed(request);
}

static int file_zero(file_device *file, vx_request *request)
{
    bool sparse = (file->flags & VX_FILE_SPARSE) && !(request->flags & VX_NO_HOLE);
    bool done = sparse && allocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, request) == 0;
    if (!done)
        done = allocate(file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, request) == 0;
    if (!done && (request->flags & VX_FAST))
        return vx_fail(&file->device, request, VX_E_UNSUPPORTED, 0, request->offset);
    for (uint64_t at = 0; !done && at < request->length; at += ZERO_PIECE) {
        uint64_t n = request->length - at < ZERO_PIECE ? request->length - at : ZERO_PIECE;
        if (put(file, request, zeros, n, request->offset + at, 0) != VX_OK) {
            changed(file);
            return VX_DONE;
        }
    }
    changed(file);
    return request->flags & VX_FUA ? file_barrier(file, request) : vx_succeed(request);
}

static int file_trim(file_device *file, vx_request *request)
{
    if (file->flags & VX_FILE_SPARSE) /* only a hint: failure is ignored */
        (void)allocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, request);
    changed(file);
    return request->flags & VX_FUA ? file_barrier(file, request) : vx_succeed(request);
}

#define PROBE 65536u

/* Where the data at `at` end; at most `end`. A memory file system looks at every page up to the next
 * hole, wherever that is, and locks writers out meanwhile. There the end is first looked for in steps,
 * so holes inside a step may be reported as data. */
static uint64_t end_of_data(file_device *file, uint64_t at, uint64_t end)
{
    if (file->flags & VX_FILE_MEMORY) {
        uint64_t next = (at / PROBE + 1) * PROBE;
        while (next < end && lseek(file->fd, (off_t)next, SEEK_DATA) == (off_t)next)
            next += PROBE;
        if (next >= end)
            return end;
        at = next - PROBE > at ? next - PROBE : at;
    }
    off_t hole = lseek(file->fd, (off_t)at, SEEK_HOLE);
    return hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
}

static int file_extents(file_device *file, vx_request *request)
{
    uint64_t at = request->offset, end = at + request->length;
    request->extent_count = 0;
    while (at < end && request->extent_count < request->extent_capacity) {
        off_t data = lseek(file->fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            data = (off_t)at; /* SEEK_DATA failed: report data */
        uint64_t stop = data < 0 || (uint64_t)data > end ? end : (uint64_t)data;
        uint32_t state = VX_EXTENT_HOLE;
        if (stop == at) {
            stop = end_of_data(file, at, end);
            state = VX_EXTENT_DATA;
        }
        if (stop <= at)
            stop = end;
        request->extents[request->extent_count++] =
            (vx_extent){.offset = at,
                        .length = stop - at,
                        .state = state,
                        .depth = state == VX_EXTENT_DATA ? request->depth : -1};
        at = stop;
    }
    return vx_succeed(request);
}

static int file_submit(vx_device *device, vx_request *request)
{
    file_device *file = (file_device *)device;
    switch (request->operation) {
    case VX_READ:
        return file_read(file, request);
    case VX_WRITE:
        return file_write(file, request);
    default:
        break;
    }
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    switch (request->operation) {
    case VX_ZERO:
        return file_zero(file, request);
    case VX_TRIM:
        return file_trim(file, request);
    case VX_FLUSH:
        return file_barrier(file, request);
    case VX_EXTENTS:
        return file_extents(file, request);
    default:
        return vx_fail(device, request, VX_E_INVALID, 0, request->offset);
    }
}

static int file_resize(vx_device *device, uint64_t size)
{
    file_device *file = (file_device *)device;
    if (file->flags & VX_FILE_READ_ONLY)
        return VX_E_READONLY;
    if (file->flags & VX_FILE_FIXED)
        return size <= vx_device_size(device) ? VX_OK : VX_E_NOSPACE;
    int n;
    do
        n = ftruncate(file->fd, (off_t)size);
    while (n != 0 && errno == EINTR);
    if (n != 0)
        return code_of(errno);
    atomic_store(&file->size_changed, true);
    changed(file);
    atomic_store(&device->size, size);
    return VX_OK;
}

static void file_destroy(vx_device *device)
{
    file_device *file = (file_device *)device;
    vx_file_close(device);
    pthread_mutex_destroy(&file->lock);
    pthread_rwlock_destroy(&file->errors);
    pthread_cond_destroy(&file->synchronised);
    free(file);
}

static const vx_operations file_operations = {
    .kind = "file", .can_fua = true, .submit = file_submit, .resize = file_resize, .destroy = file_destroy};

vx_device *vx_file_create(int fd, uint64_t size, uint32_t flags, uint64_t identity)
{
    file_device *file = calloc(1, sizeof *file);
    if (file == NULL) {
        close(fd);
        return NULL;
    }
    vx_device_initialise(&file->device, &file_operations, identity, NULL, size);
    file->device.read_only = flags & VX_FILE_READ_ONLY;
    file->fd = fd;
    file->flags = flags;
    atomic_init(&file->changes, 1);
    pthread_mutex_init(&file->lock, NULL);
    pthread_rwlockattr_t barriers_first;
    pthread_rwlockattr_init(&barriers_first);
    pthread_rwlockattr_setkind_np(&barriers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&file->errors, &barriers_first);
    pthread_rwlockattr_destroy(&barriers_first);
    pthread_cond_init(&file->synchronised, NULL);
    return &file->device;
}

void vx_file_close(vx_device *device)
{
    file_device *file = (file_device *)device;
    vx_device_set_state(device, VX_E_CLOSED);
    if (file->fd >= 0)
        close(file->fd);
    file->fd = -1;
}

uint64_t vx_file_barriers(vx_device *device)
{
    return atomic_load(&((file_device *)device)->barriers);
}
