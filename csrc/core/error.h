/* SPDX-License-Identifier: MIT
 *
 * All failures of the data plane. Every function that can fail returns 0 or one of these negative
 * codes. Python maps them to exceptions in a single place (vhdx/plane/failures.py).
 */
#ifndef VX_ERROR_H
#define VX_ERROR_H

#include <stdint.h>

enum vx_error {
    VX_OK = 0,
    VX_E_RANGE = -1,          /* offset and length are not inside the device */
    VX_E_IO = -2,             /* the operating system refused; os_error says why */
    VX_E_NOSPACE = -3,        /* no space: nothing was published, the device is usable */
    VX_E_READONLY = -4,       /* a change was asked of a read-only device */
    VX_E_POISONED = -5,       /* an earlier barrier or commit failed: reopen to recover */
    VX_E_CLOSED = -6,         /* the device was closed */
    VX_E_NOMEM = -7,          /* the host is out of memory */
    VX_E_INVALID = -8,        /* an argument that no caller should pass */
    VX_E_MISSING_PARENT = -9, /* the sector lies in a parent that is not open */
    VX_E_CANCELLED = -10,     /* a waiting request or a stalled connection was dropped */
    VX_E_NO_PROGRESS = -11,   /* the same fault was answered twice without any change */
    VX_E_FORKED = -12,        /* the handle belongs to the parent process */
    VX_E_UNSUPPORTED = -13,   /* the device cannot do this, or not as fast as VX_FAST asks */
    VX_E_UPCALL = -14,        /* an upcall raised an exception that is no declared refusal */
    VX_E_DAMAGED = -15,       /* metadata that a fault needed is damaged */
    VX_E_PROTOCOL = -16       /* the peer of a connection broke the protocol */
};

/* Where and why a request failed. The device that failed it fills this in; devices above keep
 * it. */
typedef struct vx_failure {
    int32_t code;       /* enum vx_error */
    int32_t os_error;   /* errno, or 0 */
    uint32_t operation; /* enum vx_operation */
    uint32_t reserved;
    uint64_t device;    /* identity of the device that failed */
    uint64_t offset;    /* bytes, on that device */
} vx_failure;

#endif
