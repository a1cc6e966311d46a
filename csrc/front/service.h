/* SPDX-License-Identifier: MIT
 *
 * What front ends share: the life of a task between a wire and its answer.
 *
 * A service belongs to one connection. Its functions belong to the connection's thread, unless they say
 * otherwise. For each command, or for each piece of a large one, the front end
 *
 *   begins a task      the service gives it memory, or says that there is no room now
 *   submits it         the service lets a throttle park it, or runs it on the pool
 *   takes it back      when it is done `wake` becomes readable, and vx_service_take_completed returns it
 *   answers, frees it  maybe after its data have been sent
 *
 * Small requests need none of that: vx_service_try_request carries out what does not block at once.
 *
 * Memory. One piece of VX_SERVICE_PIECE bytes in each direction always has room: it is the connection's
 * own. More is charged to the pool that all connections share. So a client that stalls keeps its own
 * memory and what it borrowed. A front end whose client does not move, while it borrows and another
 * connection waits for memory, must cut it off (vx_service_is_in_the_way).
 *
 * Every task that was submitted comes back, also when its client is gone. After vx_service_drop
 * those that wait in queues come back at once, failed.
 *
 * Initiators. Requests name who asked: an initiator is one client at one export, which SCSI calls an
 * I_T nexus. It is the front end's. Connections of one initiator are dropped together.
 */
#ifndef VX_SERVICE_H
#define VX_SERVICE_H

#include <pthread.h>

#include "core/device.h"
#include "core/meter.h"
#include "core/pool.h"

#ifndef VX_SERVICE_PIECE /* smaller in the fuzzer, whose disk is small */
#define VX_SERVICE_PIECE ((size_t)1 << 20)
#endif
#define VX_SERVICE_SPARES 2u /* buffers of VX_SERVICE_PIECE bytes that are kept for reuse */
#define VX_SERVICE_STALL_NS ((uint64_t)5000000000)

struct vx_initiator {
    uint32_t epoch_slot; /* spreads initiators over epoch slots */
};

enum vx_direction { VX_TO_CLIENT = 0, VX_FROM_CLIENT = 1, VX_NO_PAYLOAD = 2 };

enum vx_beginning { VX_BEGUN, VX_NO_ROOM, VX_NO_MEMORY };

typedef struct vx_service vx_service;
typedef struct vx_task vx_task;

/* A command, or a piece of one, on its way. This is the common part; front ends put their own behind it. */
struct vx_task {
    vx_job job;
    vx_request request;
    vx_service *service;
    vx_task *next; /* of a list of completed tasks */
    uint8_t *buffer;
    size_t capacity; /* of buffer, bytes */
    enum vx_direction direction;
    bool is_command;   /* else a piece of one */
    bool is_own;       /* its buffer is the connection's own of that direction, and not charged */
    uint64_t charged;  /* to the pool, bytes */
    uint64_t began_ns; /* of a command */
    vx_task *later, **later_link; /* of the service's list */
};

typedef struct vx_service_terms {
    uint32_t commands_limit; /* under way at once */
    uint64_t bytes_limit;    /* payload under way at once, but for one piece a direction */
} vx_service_terms;

struct vx_service {
    vx_device *device; /* a reference */
    vx_pool *pool;
    const vx_initiator *initiator;
    vx_service_terms terms;
    vx_meter *meter; /* or NULL */
    int wake;        /* readable when a task was completed */

    _Atomic uint64_t under_way; /* commands not answered yet; any thread may read it */
    _Atomic uint64_t pooled;    /* tasks that went to the pool; likewise */
    uint64_t tasks;             /* that hold memory: under way, or their data on their way out */
    uint64_t bytes[2];          /* of payload in tasks, by direction */
    uint64_t borrowed;          /* of those, charged to the pool */
    uint64_t freed;             /* tasks so far */
    bool own_used[2];           /* by direction */
    bool drained;               /* the device holds nothing back any more */
    uint8_t *spare[VX_SERVICE_SPARES];
    uint32_t spare_count;

    pthread_mutex_t lock;
    /* under lock */
    vx_task *completed; /* newest first */
    vx_task *later;     /* done, and kept until a device's time for them has come */
    bool signalled;          /* `wake` is readable */
    bool dropped;
};

/* Takes a reference to `device`; `initiator` must live as long as the service. False: no memory or file
 * descriptor. */
bool vx_service_initialise(vx_service *service, vx_device *device, vx_pool *pool,
                           const vx_initiator *initiator, const vx_service_terms *terms);
void vx_service_release(vx_service *service); /* when every task was freed */
/* Makes `wake` readable. From any thread. */
void vx_service_wake(vx_service *service);

/* A command begins to be under way, and is answered. Tasks that are commands do so themselves. */
void vx_service_command_begins(vx_service *service);
void vx_service_command_ends(vx_service *service);
/* Whether one more command may be under way. */
bool vx_service_may_begin(const vx_service *service);
/* *begun: `size` bytes that start with a vx_task, with a buffer of `length` bytes; what follows the
 * vx_task is not initialised. NO_ROOM: the limits of the connection or the pool allow no more now.
 * NO_MEMORY: nothing was begun. */
enum vx_beginning vx_service_begin(vx_service *service, size_t size, enum vx_direction direction,
                                   size_t length, bool is_command, vx_task **begun);
/* Gives back what a task holds. */
void vx_service_free(vx_task *task);

/* Makes `request` a request of this service; buffer and extents are set by the caller afterwards. */
void vx_service_prepare(const vx_service *service, vx_request *request, uint32_t operation,
                        uint32_t flags, uint64_t offset, uint64_t length);
/* Carries `request` out now if it does not block: true, and it is done. Metered. */
bool vx_service_try_request(vx_service *service, vx_request *request);
/* The same for a task, not metered. False: the request is as it was. */
bool vx_service_try(vx_task *task);
/* Carries a task out; it is completed later. */
void vx_service_submit(vx_task *task);

/* What was completed, oldest first. */
vx_task *vx_service_take_completed(vx_service *service);
/* Puts tasks back that cannot be answered yet, a list by `next`, without waking anybody. */
void vx_service_put_back(vx_service *service, vx_task *oldest_first);

/* Notes an answered command. */
void vx_service_note(vx_service *service, uint32_t operation, uint64_t length, uint64_t began_ns,
                     uint64_t queued_ns);
bool vx_service_is_metered(const vx_service *service);

/* Whether the device may hold requests back (a throttle). */
bool vx_service_is_paced(const vx_service *service);
/* The device holds nothing back any more: what waits passes, or fails with `drop`. Once. */
void vx_service_drain(vx_service *service, bool drop);
/* Nobody takes answers any more: what waits in queues, or for its time, comes back at once. Once. */
void vx_service_drop(vx_service *service);
bool vx_service_is_dropped(vx_service *service);
/* Whether its client has not moved for VX_SERVICE_STALL_NS since `moved_ns`, while it borrows memory that
 * another connection has been waiting for as long. */
bool vx_service_is_in_the_way(const vx_service *service, uint64_t moved_ns);

#endif
