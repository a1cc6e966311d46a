/* SPDX-License-Identifier: MIT
 *
 * Requests and devices: the contract that every part of the data plane relies on.
 *
 * A request is an operation on a byte range with its buffer, flags and completion. vx_submit hands
 * it to a device, which answers
 *
 *   VX_DONE     request->result holds 0 or a negative vx_error; nothing more will happen
 *   VX_AGAIN    only with VX_NOWAIT: answering now would block. What was done so far may stay: it is
 *               nothing that the repeated request would not do
 *   VX_PARKED   request->complete is called exactly once, perhaps before vx_submit returns. The
 *               submitter must not touch the request any more; only the completion may. Allowed
 *               only without VX_NOWAIT, or with VX_MAY_PARK. The device clears request->memo, which is
 *               on the submitter's stack
 *   VX_FAULTED  the device lacks something that its fault handler must provide; request->fault
 *               says what. The whole stack is unwound: no epoch, lock or buffer is held. The
 *               driver (run.h) calls the handler once and submits the request again.
 *
 * Rules
 *   range      checked, overflow-safe, in two places: where a request enters (a front end checks
 *              the whole command, vx_transfer each call), and in vx_submit of the device that
 *              carries it out, because the disk may have shrunk meanwhile; devices that only
 *              forward requests do not check it
 *   buffers    belong to the caller until DONE or completion
 *   sleeping   never inside a device: a device that models time sets not_before_ns, and the front
 *              end holds the reply until then
 *   restart    every operation may be submitted again from the start after AGAIN or FAULTED; the
 *              first `done` bytes of the range need not be repeated
 *   delays     a device that sets not_before_ns answers AGAIN to NOWAIT without MAY_PARK. Else the
 *              submitter, who cannot wait, would submit the request a second time. A request that
 *              depends on an earlier one starts at that one's not_before_ns (starts_ns), so that
 *              modelled times add up although the I/O is done at once
 *   stack      a request on a caller's stack is never parked without a wait: vx_call takes MAY_PARK
 *              away from a child that must not block
 *   holes      of a READ that has `extents`: runs of zeros that are not written into the buffer. Their
 *              offsets are those of the request's device. Holes that find no room in `extents` are
 *              written as zeros. After FAULTED the holes in the first `done` bytes stay
 *   poison     a failed barrier sets the device's state; every later request fails with that state
 *
 * A device that forwards requests submits the same request to its lower device and returns the answer.
 * To see how the request ends it replaces `complete` and `context` first. It puts both back when the
 * answer is not PARKED, and in its own completion before it calls theirs. It needs no upcalls, because
 * a fault names the device that made it. A device that parks a request holds a reference to
 * itself until the request completes.
 */
#ifndef VX_DEVICE_H
#define VX_DEVICE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

typedef struct vx_device vx_device;
typedef struct vx_request vx_request;
typedef struct vx_initiator vx_initiator; /* one client at one export (front/service.h) */

enum vx_operation {
    VX_READ = 0,
    VX_WRITE = 1,
    VX_ZERO = 2,
    VX_TRIM = 3,
    VX_FLUSH = 4,
    VX_EXTENTS = 5
};

enum vx_flag {
    VX_FUA = 1,      /* durable before done (operations that write) */
    VX_NOWAIT = 2,   /* answer AGAIN rather than block */
    VX_NO_HOLE = 4,  /* ZERO: the range must be stored afterwards */
    VX_FAST = 8,    /* ZERO: fail with UNSUPPORTED unless faster than writing */
    VX_MAY_PARK = 16, /* with NOWAIT: a device may park the request, but must not block */
    /* FLUSH: what was written before is durable before anything that is written after it, but not
     * necessarily now. A device that keeps no order makes a barrier. */
    VX_ORDER = 32
};

enum vx_answer { VX_DONE = 0, VX_AGAIN = 1, VX_PARKED = 2, VX_FAULTED = 3 };

enum vx_extent_state { VX_EXTENT_DATA = 0, VX_EXTENT_ZERO = 1, VX_EXTENT_HOLE = 2 };

typedef struct vx_extent {
    uint64_t offset; /* bytes */
    uint64_t length; /* bytes */
    uint32_t state;  /* enum vx_extent_state */
    int32_t depth;   /* 0 this device, 1 its parent ...; -1 for holes */
} vx_extent;

enum vx_fault_kind {
    VX_FAULT_LOAD = 0,   /* entries of pages [first, first + count) are unknown */
    VX_FAULT_GRANT = 1,  /* no ready space; count says how many pages are wanted */
    VX_FAULT_GATE = 2,   /* the first change since the gate was closed */
    VX_FAULT_RANGE = 3,  /* whole pages are to be zeroed or trimmed (operation) */
    VX_FAULT_COMMIT = 4, /* pages and entries are to be made durable */
    VX_FAULT_ROW = 5,    /* a row of a layout has no slabs, or may not be changed yet: first */
    VX_FAULT_MEMBER = 6  /* a disk of a layout failed a request (disk, operation, code, os_error) */
};

/* A modelled time: that of a clock which may be virtual. Nobody sleeps until a virtual time. */
typedef struct vx_time {
    uint64_t ns; /* 0: none */
    bool is_virtual;
} vx_time;

typedef struct vx_fault {
    vx_device *device;
    vx_time time;       /* in: when the request starts; out: when what the owner did is done */
    uint32_t kind;      /* enum vx_fault_kind */
    uint32_t operation; /* enum vx_operation; RANGE and MEMBER */
    uint64_t first;     /* page; row; MEMBER: UINT64_MAX if it was a flush */
    uint64_t count;     /* pages, or entries of a commit */
    uint64_t size;      /* RANGE: device size when the pages were counted, bytes */
    const uint64_t *pages;   /* COMMIT: the pages published, oldest first; may repeat */
    const uint64_t *entries; /* COMMIT: their entries */
    uint64_t generation;     /* COMMIT: the generation to be made durable */
    uint64_t bitmap_count;         /* COMMIT: sector bitmaps that changed */
    uint64_t bitmap_bytes;         /* COMMIT: of each */
    const uint64_t *bitmap_pages;  /* COMMIT: their pages */
    const uint8_t *bitmap_bits;    /* COMMIT: their bits, concatenated */
    uint32_t disk;                 /* MEMBER: its index */
    uint64_t leaf;                 /* MEMBER: the identity of what was there; it may have left */
    int32_t code, os_error;        /* MEMBER: why it failed */
} vx_fault;

/* How C calls its owner. C passes an integer identity, never a pointer. Results: 0 or a
 * vx_error. */
typedef struct vx_upcalls {
    int (*fault)(uint64_t device, vx_fault *fault);
    int (*perform)(uint64_t device, vx_request *request);  /* callback devices */
    int (*resize)(uint64_t device, uint64_t size);         /* callback devices */
    struct vx_delegate *delegate; /* makes the main thread's upcalls (delegate.h); or NULL */
} vx_upcalls;

#define VX_MEMO_RANGES 8

/* RANGE faults already answered for a request, so that a restart does not raise them again. */
typedef struct vx_memo {
    uint32_t count;
    struct {
        const vx_device *device;
        uint64_t first;
        uint64_t count;
    } ranges[VX_MEMO_RANGES];
} vx_memo;

/* State that a layer keeps in a request while it handles the request. Each layer uses only its own
 * frame. All frames are zero in a new request and in a child. Two devices of one layer must not
 * handle the same request: put a device that makes children between them. */
enum vx_layer { VX_LAYER_THROTTLE = 0, VX_LAYER_SCHEDULE = 1, VX_LAYER_MAP = 2, VX_LAYERS = 3 };

#define VX_FRAME_BYTES 16u

typedef struct vx_frame {
    _Alignas(8) unsigned char bytes[VX_FRAME_BYTES];
} vx_frame;

/* Defines `type *name(vx_request *)`, the frame of `layer`; mark `type` with VX_FRAME_TYPE. */
#define VX_FRAME_TYPE __attribute__((may_alias))
#define VX_DEFINE_FRAME(name, type, layer)                                                           \
    _Static_assert(sizeof(type) <= VX_FRAME_BYTES, "the frame is too large");                        \
    static inline type *name(vx_request *request)                                                    \
    {                                                                                                \
        return (type *)(void *)request->frames[layer].bytes;                                         \
    }

struct vx_request {
    uint32_t operation;
    uint32_t flags;
    uint64_t offset;
    uint64_t length;
    uint8_t *buffer; /* READ: filled; WRITE: the data; else unused */

    int32_t result;
    uint32_t epoch_slot;   /* a hint that spreads threads over epoch slots */
    uint64_t done;   /* leading bytes that need not be repeated */
    uint64_t not_before_ns; /* when it is done, by the clock of a delay below; 0: no delay */
    uint64_t starts_ns;     /* a delay counts from here, if that is later than now */
    bool virtual_time;      /* not_before_ns and starts_ns are times of a virtual clock */
    _Atomic uint8_t waits_for; /* the level of the pool that completes it while it is parked; 0: unknown */
    uint64_t queued_ns;     /* time spent in queues of throttles and schedulers so far */

    vx_extent *extents; /* EXTENTS: room for extent_capacity; READ: holes, see above; or NULL */
    uint32_t extent_capacity;
    uint32_t extent_count;
    int32_t depth; /* EXTENTS: depth that this device reports */
    const vx_initiator *initiator; /* the client; NULL: the program itself */
    vx_frame frames[VX_LAYERS];

    vx_memo *memo;   /* of the driver (run.h) */
    void (*complete)(vx_request *request);
    void *context;
    vx_request *next; /* for the list the request is parked in */

    vx_failure failure;
    vx_fault fault;
};

/* What a device does. Every function but `submit` and `destroy` may be NULL. */
typedef struct vx_operations {
    const char *kind;
    int (*submit)(vx_device *device, vx_request *request);
    int (*resize)(vx_device *device, uint64_t size);
    void (*destroy)(vx_device *device);
    bool forwards; /* it forwards requests unchanged, so the device below checks their range */
    bool can_fua;  /* a WRITE or ZERO with FUA needs nothing but that request: no commit, no wait */
    /* A throttle, which front ends drain: it is the top device of its stack, and has `drain`,
     * `is_holding` and `is_limited`. */
    bool paces;
    /* Stops holding requests back. Waiting requests pass, or with `drop` fail with CANCELLED. */
    void (*drain)(vx_device *device, bool drop);
    bool (*is_holding)(vx_device *device); /* whether a request waits here or below */
    /* Whether it may hold requests back for long. Its requests in flight then get less memory. */
    bool (*is_limited)(vx_device *device);
    /* Fails with CANCELLED the requests of `initiator` that wait in queues, because the client is
     * gone. NULL if no request waits in a queue, here or below. */
    void (*drop)(vx_device *device, const vx_initiator *initiator);
} vx_operations;

struct vx_device {
    const vx_operations *operations;
    const vx_upcalls *upcalls;
    uint64_t identity;
    _Atomic uint64_t size;     /* bytes */
    _Atomic int32_t state;     /* 0, or the error of every further request */
    _Atomic uint32_t references;
    _Atomic uint64_t progress; /* raised by every change that a fault handler makes */
    _Atomic bool read_only;
    vx_device *sized_by; /* the lower device whose size is also this device's; NULL: it has its own */
};

/* Initialises the common part of `device`. The caller holds the first reference. */
void vx_device_initialise(vx_device *device, const vx_operations *operations, uint64_t identity,
                          const vx_upcalls *upcalls, uint64_t size);
vx_device *vx_device_reference(vx_device *device);
void vx_device_release(vx_device *device); /* destroys at the last reference; NULL is allowed */

uint64_t vx_device_identity(const vx_device *device);
uint64_t vx_device_size(vx_device *device);
/* UNSUPPORTED where the device has no `resize`: one that forwards requests follows its lower device. */
int vx_device_resize(vx_device *device, uint64_t size);
int vx_device_state(vx_device *device);
/* The first state other than 0 stays, except that FORKED replaces anything. */
void vx_device_set_state(vx_device *device, int state);
/* Refuses new changes; changes in flight continue. */
void vx_device_freeze(vx_device *device);

/* Checks the state, and the range unless the device forwards requests. Refuses changes to a
 * read-only device. Then hands the request to the device. A request of zero length is done at once,
 * unless it is FLUSH or EXTENTS. */
int vx_submit(vx_device *device, vx_request *request);
/* Whether the range of `request` is inside the device now; if not, the request has failed. */
bool vx_is_inside(vx_device *device, vx_request *request);

/* Whether FUA may be passed to `device`: to a leaf, or to one that forwards requests to a leaf. */
bool vx_can_fua(const vx_device *device);

/* Makes `child` a request with the initiator and flags of `parent`, and with empty frames. */
void vx_request_child(vx_request *child, const vx_request *parent, uint32_t operation,
                      uint64_t offset, uint64_t length, uint8_t *buffer);
/* Prepares an unfinished request for another attempt, which may block. `done`: leading bytes that
 * need not be repeated. */
void vx_request_again(vx_request *request, uint64_t done);
/* Copies the result, failure and delay of an answered child into its parent. */
void vx_request_adopt(vx_request *parent, const vx_request *child);
/* What follows in `request` starts when what was done so far is done. */
void vx_request_follow(vx_request *request);

/* Fails `request` here: sets result and failure, and returns VX_DONE. */
int vx_fail(vx_device *device, vx_request *request, int code, int os_error, uint64_t offset);
int vx_succeed(vx_request *request);

#endif
