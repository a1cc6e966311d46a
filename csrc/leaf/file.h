/* SPDX-License-Identifier: MIT
 *
 * A device on an open host file or block device, with buffered I/O and no cache of its own.
 *
 *   READ    with NOWAIT reads only from the page cache (RWF_NOWAIT); memory file systems never
 *           block
 *   WRITE   buffered; with NOWAIT done at once, because it only copies into the page cache. After a
 *           write that took longer than VX_SLOW_WRITE_NS, the next 64 NOWAIT writes are answered
 *           AGAIN and go to the pool. With VX_FILE_ALLOCATE a write of at least VX_LARGE_WRITE
 *           bytes first reserves its range, so that the file system gives it one extent and large
 *           pages
 *   FUA     a plain write, which may find no space, then the same write with RWF_DSYNC, whose
 *           failure poisons the device. It is a barrier for its own data only
 *   ZERO    punches a hole in a sparse file, else FALLOC_FL_ZERO_RANGE, else writes zeros
 *   TRIM    punches a hole in a sparse file, else nothing
 *   FLUSH   a barrier (fdatasync, or fsync when the file's size changed since the last one). None is
 *           made if a finished one began after the last change that had ended when this flush
 *           arrived. Flushes that arrive during a barrier share the next one
 *
 * A failed barrier fails with IO and poisons the device: the kernel reports a lost write only once, so
 * a second fsync would wrongly succeed. The flushes and FUA writes that ran beside it or waited for it
 * find the device poisoned and fail as well.
 */
#ifndef VX_FILE_H
#define VX_FILE_H

#include "core/device.h"

#define VX_SLOW_WRITE_NS 1000000u
#define VX_LARGE_WRITE 262144u

enum vx_file_flag {
    VX_FILE_READ_ONLY = 1,
    VX_FILE_SPARSE = 2,
    VX_FILE_MEMORY = 4,  /* a memory file system */
    VX_FILE_ALLOCATE = 8, /* a new file that is written in bulk */
    VX_FILE_FIXED = 16    /* a block device: it keeps its size; growing it finds no space */
};

/* Takes ownership of `fd`, even on failure (NULL: no memory). */
vx_device *vx_file_create(int fd, uint64_t size, uint32_t flags, uint64_t identity);
/* Closes the descriptor now. No request may be in flight; later requests fail with CLOSED. */
void vx_file_close(vx_device *device);
/* Barriers that reached the file: fdatasync, fsync and RWF_DSYNC writes. */
uint64_t vx_file_barriers(vx_device *device);

#endif
