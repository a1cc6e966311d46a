/* SPDX-License-Identifier: MIT
 *
 * The part that all front ends share: the life of a task from its arrival to its answer.
 *
 * A service belongs to one connection. Only the connection's thread may call its functions, unless
 * their comments say otherwise. For each command, or for each piece of a large one, the front end
 *
 *   begins a task      the service gives it memory, or reports that there is no room now
 *   submits it         the service lets a throttle park it, or runs it on the pool
 *   takes it back      when it is done, `wake` becomes readable and vx_service_take_completed
 *                      returns it
 *   answers, frees it  perhaps after its data have been sent
 *
 * Small requests need no task: vx_service_try_request carries out at once a request that does not
 * block.
 *
 * Memory. Each connection has memory of its own for one piece of VX_SERVICE_PIECE bytes in each
 * direction. It borrows more from the pool that all connections share. A stalled client keeps both.
 * If a client makes no progress while its connection borrows and another connection waits for
 * memory, the front end must cut it off (vx_service_is_in_the_way).
 *
 * Every submitted task comes back, even when its client is gone. After vx_service_drop, tasks that
 * wait in queues fail and come back at once.
 *
 * Initiators. A request names its initiator: one client at one export, which SCSI calls an I_T
 * nexus. The front end owns the initiator. Connections of one initiator are dropped together.
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

/* A command in flight, or a piece of one. Front ends append their own fields to this common
 * part. */
struct vx_task {
    vx_job job;
    vx_request request;
    vx_service *service;
    vx_task *next; /* of a list of completed tasks */
    uint8_t *buffer;
    size_t capacity; /* of buffer, bytes */
    enum vx_direction direction;
    bool is_command;   /* else a piece of one */
    bool is_own;       /* uses the connection's own memory, which is not charged */
    uint64_t charged;  /* to the pool, bytes */
    uint64_t began_ns; /* of a command */
    vx_task *later, **later_link; /* in the service's `later` list */
};

typedef struct vx_service_terms {
    uint32_t commands_limit; /* in flight at once */
    uint64_t bytes_limit;    /* bytes of payload in flight; the first piece of each direction always fits */
} vx_service_terms;

struct vx_service {
    vx_device *device; /* a reference */
    vx_pool *pool;
    const vx_initiator *initiator;
    vx_service_terms terms;
    vx_meter *meter; /* or NULL */
    int wake;        /* readable when a task was completed */

    _Atomic uint64_t under_way; /* commands not answered yet; any thread may read it */
    _Atomic uint64_t pooled;    /* tasks that went to the pool; any thread may read it */
    uint64_t tasks;             /* that hold memory: until their data are sent */
    uint64_t bytes[2];          /* payload of tasks, by direction */
    uint64_t borrowed;          /* the part of them that is charged to the pool */
    uint64_t freed;             /* tasks freed so far */
    bool own_used[2];           /* by direction */
    bool drained;               /* the device no longer holds requests back */
    uint8_t *spare[VX_SERVICE_SPARES];
    uint32_t spare_count;

    pthread_mutex_t lock;
    /* under lock */
    vx_task *completed; /* newest first */
    vx_task *later;     /* done, and held until their not_before_ns */
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

/* A command is in flight, or was answered. Tasks that are commands call these themselves. */
void vx_service_command_begins(vx_service *service);
void vx_service_command_ends(vx_service *service);
/* Whether one more command may be in flight. */
bool vx_service_may_begin(const vx_service *service);
/* *begun: `size` bytes that start with a vx_task, and a buffer of `length` bytes. The bytes after
 * the vx_task are not initialised. NO_ROOM: the limits of the connection or the pool allow no more
 * now. NO_MEMORY: no task was begun. */
enum vx_beginning vx_service_begin(vx_service *service, size_t size, enum vx_direction direction,
                                   size_t length, bool is_command, vx_task **begun);
/* Frees a task and returns its memory to the connection and the pool. */
void vx_service_free(vx_task *task);

/* Makes `request` a request of this service. The caller then sets buffer and extents. */
void vx_service_prepare(const vx_service *service, vx_request *request, uint32_t operation,
                        uint32_t flags, uint64_t offset, uint64_t length);
/* Carries out `request` now if it does not block. True: the request is done. Metered. */
bool vx_service_try_request(vx_service *service, vx_request *request);
/* The same for a task, not metered. False: the task may be submitted. */
bool vx_service_try(vx_task *task);
/* Carries out a task, which vx_service_take_completed returns later. */
void vx_service_submit(vx_task *task);

/* Returns the completed tasks, oldest first. */
vx_task *vx_service_take_completed(vx_service *service);
/* Puts back tasks that cannot be answered yet, a list by `next`. Does not signal `wake`. */
void vx_service_put_back(vx_service *service, vx_task *oldest_first);

/* Notes an answered command. */
void vx_service_note(vx_service *service, uint32_t operation, uint64_t length, uint64_t began_ns,
                     uint64_t queued_ns);
bool vx_service_is_metered(const vx_service *service);

/* Whether the device may hold requests back (a throttle). */
bool vx_service_is_paced(const vx_service *service);
/* The device stops holding requests back: waiting requests pass, or with `drop` fail. Acts once. */
void vx_service_drain(vx_service *service, bool drop);
/* The client takes no more answers: tasks in queues, or held until a time, come back at once. Drains
 * the device with `drop`, unless it was drained before. Acts once. */
void vx_service_drop(vx_service *service);
/* Whether the client has neither sent nor received since `moved_ns`, VX_SERVICE_STALL_NS or longer
 * ago, while the service borrows memory that another connection has been waiting for as long. */
bool vx_service_is_in_the_way(const vx_service *service, uint64_t moved_ns);

#endif
