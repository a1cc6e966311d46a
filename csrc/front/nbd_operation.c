/* SPDX-License-Identifier: MIT */
#include "front/nbd_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void nbd_answered(vx_nbd_connection *c)
{
    c->under_way--;
    atomic_store_explicit(&c->counters.under_way, c->under_way, memory_order_relaxed);
}

static uint8_t *take_buffer(vx_nbd_connection *c, size_t capacity)
{
    if (capacity == VX_NBD_PIECE && c->spare_count > 0)
        return c->spare[--c->spare_count];
    return malloc(capacity);
}

void nbd_free_operation(void *owner, void *context)
{
    operation *op = owner;
    vx_nbd_connection *c = context;
    c->operations--;
    c->freed++;
    if (op->charged > 0) {
        vx_pool_discharge(c->pool, op->charged);
        c->borrowed -= op->charged;
    }
    if (op->direction != OTHER) {
        c->bytes[op->direction] -= op->capacity;
        if (op->is_own)
            c->own_used[op->direction] = false;
    }
    if (op->status != NULL)
        c->statuses--;
    if (op->command == NULL)
        nbd_answered(c);
    /* A spare buffer stands for one of the connection's own that is not used. */
    bool kept = c->spare_count + c->own_used[READING] + c->own_used[WRITING] < SPARE_BUFFERS;
    if (op->capacity == VX_NBD_PIECE && op->buffer != NULL && kept)
        c->spare[c->spare_count++] = op->buffer;
    else
        free(op->buffer);
    free(op->status);
    free(op);
}

bool nbd_is_paced(const vx_nbd_connection *c)
{
    return c->device->operations->hurry != NULL;
}

bool nbd_is_holding(const vx_nbd_connection *c)
{
    return nbd_is_paced(c) && c->device->operations->is_holding(c->device);
}

/* Whether what it asks for may have to wait for its turn. */
static bool nbd_is_limited(const vx_nbd_connection *c)
{
    return nbd_is_paced(c) && c->device->operations->is_limited(c->device);
}

bool nbd_may_take(const vx_nbd_connection *c)
{
    return c->under_way < c->terms.requests_limit;
}

/* Whether the connection's own limit allows so much more payload. The first piece of each direction is
 * always allowed. */
static bool may_hold(const vx_nbd_connection *c, enum direction direction, size_t capacity)
{
    uint64_t limit = c->terms.bytes_limit;
    if (limit > HELD_BYTES && nbd_is_holding(c))
        limit = HELD_BYTES;
    return c->bytes[direction] == 0 || c->bytes[READING] + c->bytes[WRITING] + capacity <= limit;
}

/* Takes the connection's own memory of that direction, or borrows. False: neither is to be had. */
static bool reserve(vx_nbd_connection *c, operation *op)
{
    if (op->direction == OTHER)
        return true;
    if (!may_hold(c, op->direction, op->capacity))
        return false;
    op->is_own = op->capacity <= VX_NBD_PIECE && !c->own_used[op->direction];
    if (op->is_own) {
        c->own_used[op->direction] = true;
        return true;
    }
    if (!vx_pool_charge(c->pool, op->capacity, nbd_is_limited(c)))
        return false;
    op->charged = op->capacity;
    c->borrowed += op->charged;
    return true;
}

enum outcome nbd_start_operation(vx_nbd_connection *c, transfer *command, const nbd_request *wire,
                                 enum direction direction, size_t length, operation **started)
{
    operation *op = malloc(sizeof *op);
    if (op == NULL)
        return LOST;
    memset(op, 0, offsetof(operation, extents));
    op->status = NULL;
    op->wire = *wire;
    op->command = command;
    op->connection = c;
    op->direction = direction;
    /* Buffers of one size are kept for the next request; small ones are not worth it. */
    op->capacity = length > INLINE_READ && length < VX_NBD_PIECE ? VX_NBD_PIECE : length;
    if (!reserve(c, op)) {
        free(op);
        return HELD;
    }
    c->operations++;
    if (direction != OTHER)
        c->bytes[direction] += op->capacity;
    if (command == NULL)
        c->under_way++;
    if (length > 0 && (op->buffer = take_buffer(c, op->capacity)) == NULL) {
        nbd_free_operation(op, c);
        return LOST;
    }
    op->began_ns = command == NULL && vx_meter_is_on(c->meter) ? vx_now_ns() : 0;
    atomic_store_explicit(&c->counters.under_way, c->under_way, memory_order_relaxed);
    *started = op;
    return TAKEN;
}

uint32_t nbd_operation_of(uint16_t command)
{
    switch (command) {
    case NBD_WRITE:
        return VX_WRITE;
    case NBD_FLUSH:
        return VX_FLUSH;
    case NBD_TRIM:
        return VX_TRIM;
    case NBD_WRITE_ZEROES:
        return VX_ZERO;
    case NBD_BLOCK_STATUS:
        return VX_EXTENTS;
    default:
        return VX_READ;
    }
}

void nbd_prepare(const vx_nbd_connection *c, vx_request *request, const nbd_request *wire)
{
    memset(request, 0, offsetof(vx_request, failure));
    request->operation = nbd_operation_of(wire->command);
    request->slot = c->terms.slot;
    request->owner = c;
    if (request->operation == VX_FLUSH)
        return;
    request->offset = wire->offset;
    request->length = wire->length;
    if (request->operation != VX_READ && request->operation != VX_EXTENTS) {
        request->flags = (wire->flags & NBD_FLAG_FUA ? VX_FUA : 0) |
                         (wire->flags & NBD_FLAG_NO_HOLE ? VX_NO_HOLE : 0) |
                         (wire->flags & NBD_FLAG_FAST_ZERO ? VX_FAST : 0);
    }
}

static void hand_back(operation *op)
{
    vx_nbd_connection *c = op->connection;
    uint64_t one = 1;
    pthread_mutex_lock(&c->lock);
    op->next = c->completed;
    c->completed = op;
    bool signal = !c->signalled;
    c->signalled = true;
    /* Under the lock, so that the connection cannot be destroyed between the two. */
    while (signal && write(c->wake, &one, sizeof one) < 0 && errno == EINTR)
        ;
    pthread_mutex_unlock(&c->lock);
}

static void delayed(vx_job *job)
{
    operation *op = (operation *)job;
    vx_nbd_connection *c = op->connection;
    pthread_mutex_lock(&c->lock);
    *op->later_link = op->later;
    if (op->later != NULL)
        op->later->later_link = op->later_link;
    pthread_mutex_unlock(&c->lock);
    hand_back(op);
}

static void completed(vx_request *request)
{
    operation *op = request->context;
    vx_nbd_connection *c = op->connection;
    bool waits = false;
    if (request->not_before_ns > vx_now_ns()) {
        pthread_mutex_lock(&c->lock);
        waits = !c->dropped;
        if (waits) {
            op->later = c->later;
            op->later_link = &c->later;
            if (op->later != NULL)
                op->later->later_link = &op->later;
            c->later = op;
            op->job.run = delayed;
            vx_pool_push_at(c->pool, &op->job, request->not_before_ns);
        }
        pthread_mutex_unlock(&c->lock);
    }
    if (!waits)
        hand_back(op);
}

void nbd_drop(vx_nbd_connection *c)
{
    pthread_mutex_lock(&c->lock);
    c->dropped = true;
    for (operation *op = c->later; op != NULL; op = op->later)
        vx_pool_hasten(c->pool, &op->job);
    pthread_mutex_unlock(&c->lock);
    if (c->device->operations->drop != NULL)
        c->device->operations->drop(c->device, c);
}

static void run_operation(vx_job *job)
{
    operation *op = (operation *)job;
    op->request.complete = completed;
    op->request.context = op;
    if (vx_run(op->connection->device, &op->request) == VX_DONE)
        completed(&op->request);
}

/* Lets a throttle park it from here, without a turn on the pool. False: request as it was. */
static bool park_operation(vx_nbd_connection *c, operation *op)
{
    uint64_t done = op->request.done;
    op->request.complete = completed;
    op->request.context = op;
    op->request.flags |= VX_NOWAIT | VX_MAY_PARK;
    int answer = vx_submit(c->device, &op->request);
    if (answer == VX_PARKED)
        return true;
    if (answer == VX_DONE) {
        completed(&op->request);
        return true;
    }
    vx_request_again(&op->request, done);
    return false;
}

void nbd_send_to_pool(vx_nbd_connection *c, operation *op)
{
    if (nbd_is_paced(c) && park_operation(c, op))
        return;
    nbd_count(&c->counters.pooled, 1);
    op->job.run = run_operation;
    vx_pool_push(c->pool, &op->job);
}

bool nbd_try_operation(vx_nbd_connection *c, operation *op)
{
    op->request.flags |= VX_NOWAIT;
    if (vx_submit(c->device, &op->request) == VX_DONE && op->request.not_before_ns == 0)
        return true;
    vx_request_again(&op->request, 0);
    return false;
}
