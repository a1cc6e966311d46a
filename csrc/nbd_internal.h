/* SPDX-License-Identifier: MIT
 *
 * What the three parts of an NBD connection share: nbd.c has the socket and the life of a connection,
 * nbd_request.c takes requests from the input and answers them, nbd_operation.c runs what is not
 * answered inline. Everything belongs to the connection's thread but `completed`, `signalled` (under
 * `lock`), `stopping` and the counters.
 */
#ifndef VX_NBD_INTERNAL_H
#define VX_NBD_INTERNAL_H

#include <pthread.h>

#include "nbd.h"
#include "nbd_output.h"
#include "nbd_wire.h"
#include "run.h"

#define INPUT_BYTES ((size_t)512 << 10)
#define INLINE_READ 65536u      /* larger reads get a buffer of their own */
#define STATUS_EXTENTS 1024u    /* extents in one answer to BLOCK_STATUS */
#define READ_HOLES 32u          /* holes that a structured read tells apart */
#define STARVED_POLL_MS 5
#define SPARE_BUFFER ((size_t)1 << 20)
#define SPARE_BUFFERS 4u
#define OUTPUT_LIMIT ((uint64_t)64 << 20)
#define HELD_BYTES ((uint64_t)4 << 20) /* payload under way while a throttle holds requests up */

/* HELD: there is no room for it now. SHORT: more of it must arrive. LOST: it, or the stream, is. */
enum outcome { TAKEN, HELD, SHORT, LOST };

/* A request that has a life of its own: large, or not answered inline. */
typedef struct operation {
    vx_job job;
    vx_request request;
    nbd_request wire;
    vx_nbd_connection *connection;
    struct operation *next;
    uint8_t *buffer;
    size_t capacity; /* of buffer */
    uint64_t charged;
    uint64_t began_ns; /* 0: not metered */
    struct operation *later, **later_link; /* of the connection's list */
    vx_extent extents[READ_HOLES];
    vx_extent *status; /* BLOCK_STATUS */
} operation;

struct vx_nbd_connection {
    int fd, wake;
    vx_device *device;
    vx_pool *pool;
    vx_nbd_terms terms;
    nbd_terms rules;

    uint8_t *input;
    size_t begin, end;
    operation *filling; /* a WRITE whose payload is still arriving */
    uint64_t filled;
    uint64_t discard; /* payload of a refused WRITE, still to be thrown away */
    nbd_request refused;
    enum nbd_error refusal;

    nbd_output output;
    uint64_t under_way, bytes_under_way;
    bool disconnecting; /* no further request is read */
    bool gone;          /* the peer takes no replies */
    bool ended;         /* the peer sends nothing more; what it sent is still answered */
    bool held;          /* the front request found no room when it was last tried */
    bool starved;       /* the front request waits for the pool's byte limit */
    int result;

    pthread_mutex_t lock;
    operation *completed; /* under lock, newest first */
    operation *later;     /* under lock: done, and kept until a device's time for them has come */
    bool signalled;       /* under lock: a byte is in `wake` */
    _Atomic bool stopping;

    uint8_t *spare[SPARE_BUFFERS]; /* of SPARE_BUFFER bytes each */
    uint32_t spare_count;
    vx_extent holes[READ_HOLES];
    vx_nbd_counters counters;
    vx_meter *meter; /* or NULL */
    bool hurried;    /* the device was told to hold up nothing */
    bool dropped;    /* and to forget what waits */
};

static inline void nbd_count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

/* ---- nbd_operation.c ---- */

/* Whether the limits allow one more operation of so many bytes; one alone is always allowed. */
bool nbd_may_start(const vx_nbd_connection *c, uint64_t bytes);
/* TAKEN, and *started with a buffer of `length`; HELD: no room now (limits); LOST: no memory. */
enum outcome nbd_start_operation(vx_nbd_connection *c, const nbd_request *wire, size_t length,
                                 operation **started);
/* Gives back what an operation holds; `context` is its connection (for nbd_output). */
void nbd_free_operation(void *owner, void *context);
/* What a command asks of the device; CACHE is no operation, and counts as a read. */
uint32_t nbd_operation_of(uint16_t command);
/* The request on the device that a request on the wire asks for. */
void nbd_prepare(const vx_nbd_connection *c, vx_request *request, const nbd_request *wire);
/* Runs it on the pool; it comes back through `completed`, with the connection woken. */
void nbd_send_to_pool(vx_nbd_connection *c, operation *op);
/* Runs it here if it does not block: true, and it is done. False: request as it was. */
bool nbd_try_operation(vx_nbd_connection *c, operation *op);
/* Whether the device may hold requests up (a throttle), and whether it does. */
bool nbd_is_paced(const vx_nbd_connection *c);
bool nbd_is_holding(const vx_nbd_connection *c);
/* Nobody takes answers any more: what waits in queues, or for its time, comes back at once. */
void nbd_drop(vx_nbd_connection *c);

/* ---- nbd_request.c ---- */

/* Takes everything that can be taken from the input. False: the stream is lost. */
bool nbd_take_input(vx_nbd_connection *c);
/* Answers what completed, as far as there is room. */
void nbd_take_completions(vx_nbd_connection *c);

#endif
