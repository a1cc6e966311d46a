/* SPDX-License-Identifier: MIT */
#include "nbd.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

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
    bool signalled;       /* under lock: a byte is in `wake` */
    _Atomic bool stopping;

    uint8_t *spare[SPARE_BUFFERS]; /* of SPARE_BUFFER bytes each */
    uint32_t spare_count;
    vx_extent holes[READ_HOLES];
    vx_nbd_counters counters;
};

static void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

/* ---- operations ---- */

static uint8_t *take_buffer(vx_nbd_connection *c, size_t capacity)
{
    if (capacity == SPARE_BUFFER && c->spare_count > 0)
        return c->spare[--c->spare_count];
    return malloc(capacity);
}

static void free_operation(void *owner, void *context)
{
    operation *op = owner;
    vx_nbd_connection *c = context;
    if (op->charged > 0)
        vx_pool_discharge(c->pool, op->charged);
    c->under_way--;
    c->bytes_under_way -= op->charged;
    atomic_store_explicit(&c->counters.under_way, c->under_way, memory_order_relaxed);
    if (op->capacity == SPARE_BUFFER && c->spare_count < SPARE_BUFFERS)
        c->spare[c->spare_count++] = op->buffer;
    else
        free(op->buffer);
    free(op->status);
    free(op);
}

static bool may_start(vx_nbd_connection *c, uint64_t bytes)
{
    return c->under_way == 0 || (c->under_way < c->terms.requests_limit &&
                                 c->bytes_under_way + bytes <= c->terms.bytes_limit);
}

/* TAKEN, and *started; HELD: no room now (limits); LOST: no memory. */
static enum outcome start_operation(vx_nbd_connection *c, const nbd_request *wire, size_t length,
                                    operation **started)
{
    /* Buffers of one size are kept for the next request; small ones are not worth it. */
    size_t capacity = length > INLINE_READ && length < SPARE_BUFFER ? SPARE_BUFFER : length;
    if (!may_start(c, capacity))
        return HELD;
    c->starved = !vx_pool_charge(c->pool, capacity);
    if (c->starved)
        return HELD;
    operation *op = malloc(sizeof *op);
    uint8_t *buffer = NULL;
    if (op != NULL && length > 0)
        buffer = take_buffer(c, capacity);
    if (op == NULL || (length > 0 && buffer == NULL)) {
        vx_pool_discharge(c->pool, capacity);
        free(op);
        return LOST;
    }
    memset(op, 0, offsetof(operation, extents));
    op->status = NULL;
    op->wire = *wire;
    op->connection = c;
    op->buffer = buffer;
    op->capacity = capacity;
    op->charged = capacity;
    c->under_way++;
    c->bytes_under_way += capacity;
    atomic_store_explicit(&c->counters.under_way, c->under_way, memory_order_relaxed);
    *started = op;
    return TAKEN;
}

static uint32_t operation_of(uint16_t command)
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

static void prepare(vx_nbd_connection *c, vx_request *request, const nbd_request *wire)
{
    memset(request, 0, offsetof(vx_request, failure));
    request->operation = operation_of(wire->command);
    request->slot = c->terms.slot;
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
    hand_back((operation *)job);
}

static void completed(vx_request *request)
{
    operation *op = request->context;
    if (request->not_before_ns > vx_now_ns()) {
        op->job.run = delayed;
        vx_pool_push_at(op->connection->pool, &op->job, request->not_before_ns);
    } else {
        hand_back(op);
    }
}

static void run_operation(vx_job *job)
{
    operation *op = (operation *)job;
    op->request.complete = completed;
    op->request.context = op;
    if (vx_run(op->connection->device, &op->request) == VX_DONE)
        completed(&op->request);
}

static void send_to_pool(vx_nbd_connection *c, operation *op)
{
    count(&c->counters.pooled, 1);
    op->job.run = run_operation;
    vx_pool_push(c->pool, &op->job);
}

/* ---- replies ---- */

static void reply_status(vx_nbd_connection *c, enum nbd_error error, const nbd_request *wire)
{
    uint8_t *out = nbd_output_stage(&c->output);
    size_t n;
    if (error != NBD_OK)
        count(&c->counters.errors, 1);
    if (!c->rules.structured)
        n = nbd_put_simple(out, error, wire->cookie);
    else if (error != NBD_OK)
        n = nbd_put_error(out, wire->cookie, error);
    else if (wire->command == NBD_READ) /* zero length: a READ must not get a simple reply */
        n = nbd_put_chunk(out, true, NBD_CHUNK_NONE, wire->cookie, 0);
    else
        n = nbd_put_simple(out, NBD_OK, wire->cookie);
    nbd_output_staged(&c->output, n);
}

static void reply_block_status(vx_nbd_connection *c, const nbd_request *wire,
                               const vx_extent *extents, uint32_t extent_count)
{
    uint8_t *out = nbd_output_stage(&c->output), *at = out + NBD_CHUNK_BYTES + 4;
    uint32_t flags = 0, length = 0, written = 0;
    uint32_t limit = wire->flags & NBD_FLAG_REQ_ONE ? 1 : STATUS_EXTENTS;
    for (uint32_t i = 0; i < extent_count; i++) {
        uint32_t state = extents[i].state == VX_EXTENT_DATA ? 0 : NBD_STATE_HOLE | NBD_STATE_ZERO;
        if (length > 0 && state == flags) {
            length += (uint32_t)extents[i].length; /* inside the request's 32 bits */
            continue;
        }
        if (length > 0) {
            nbd_put_u32(at, length);
            nbd_put_u32(at + 4, flags);
            at += 8;
            written++;
        }
        length = 0;
        if (written == limit)
            break;
        flags = state;
        length = (uint32_t)extents[i].length;
    }
    if (length > 0) {
        nbd_put_u32(at, length);
        nbd_put_u32(at + 4, flags);
        at += 8;
    }
    nbd_put_chunk(out, true, NBD_CHUNK_STATUS, wire->cookie,
                  (uint32_t)(at - out) - NBD_CHUNK_BYTES);
    nbd_put_u32(out + NBD_CHUNK_BYTES, c->terms.context_id);
    nbd_output_staged(&c->output, (size_t)(at - out));
}

/* A read whose data stand in op->buffer, with holes that were not filled in. */
static void reply_read(vx_nbd_connection *c, operation *op)
{
    const nbd_request *wire = &op->wire;
    uint64_t at = 0, length = wire->length;
    uint32_t hole = 0, holes = op->request.extent_count;
    if (!c->rules.structured) {
        nbd_output_staged(&c->output,
                          nbd_put_simple(nbd_output_stage(&c->output), NBD_OK, wire->cookie));
        nbd_output_refer(&c->output, op->buffer, length, op);
        return;
    }
    while (at < length) {
        uint64_t stop = hole < holes ? op->extents[hole].offset - wire->offset : length;
        bool is_hole = stop == at;
        if (is_hole)
            stop = at + op->extents[hole++].length;
        bool last = stop == length;
        uint8_t *out = nbd_output_stage(&c->output);
        uint32_t n = (uint32_t)(stop - at);
        uint64_t offset = wire->offset + at;
        nbd_output_staged(&c->output, is_hole ? nbd_put_hole(out, last, wire->cookie, offset, n)
                                              : nbd_put_data(out, last, wire->cookie, offset, n));
        if (!is_hole)
            nbd_output_refer(&c->output, op->buffer + at, n, last ? op : NULL);
        else if (last)
            nbd_output_refer(&c->output, op->buffer, 0, op);
        at = stop;
    }
}

static void reply_operation(vx_nbd_connection *c, operation *op)
{
    enum nbd_error error = nbd_error_of(op->request.result, &op->wire);
    bool kept = false;
    if (c->gone) {
        /* nobody listens */
    } else if (error == NBD_OK && op->wire.command == NBD_READ) {
        reply_read(c, op);
        kept = true;
    } else if (error == NBD_OK && op->wire.command == NBD_BLOCK_STATUS) {
        reply_block_status(c, &op->wire, op->status, op->request.extent_count);
    } else {
        reply_status(c, error, &op->wire);
    }
    if (!kept)
        free_operation(op, c);
}

/* ---- requests ---- */


static bool room_for_reply(vx_nbd_connection *c, size_t staged)
{
    if (nbd_output_fits(&c->output, staged, 2 * READ_HOLES + 4))
        return true;
    if (nbd_output_send(&c->output, c->fd) < 0)
        c->gone = true;
    return c->gone || nbd_output_fits(&c->output, staged, 2 * READ_HOLES + 4);
}

/* Reads into the staging buffer behind the place of its header. False: not answered. */
static bool read_inline(vx_nbd_connection *c, const nbd_request *wire)
{
    vx_request request;
    bool structured = c->rules.structured;
    size_t header = structured ? NBD_CHUNK_BYTES + 8 : NBD_SIMPLE_REPLY_BYTES;
    uint8_t *out = nbd_output_stage(&c->output);
    prepare(c, &request, wire);
    request.flags |= VX_NOWAIT;
    request.buffer = out + header;
    if (structured && !(wire->flags & NBD_FLAG_DF)) {
        request.extents = c->holes;
        request.extent_capacity = 1;
    }
    if (vx_submit(c->device, &request) != VX_DONE || request.not_before_ns != 0)
        return false;
    if (request.result != 0) {
        reply_status(c, nbd_error_of(request.result, wire), wire);
        return true;
    }
    if (request.extent_count > 0 && request.extents[0].length == wire->length) {
        nbd_output_staged(&c->output,
                          nbd_put_hole(out, true, wire->cookie, wire->offset, wire->length));
        return true;
    }
    if (request.extent_count > 0)
        memset(out + header + (request.extents[0].offset - wire->offset), 0,
               request.extents[0].length);
    if (structured)
        nbd_put_data(out, true, wire->cookie, wire->offset, wire->length);
    else
        nbd_put_simple(out, NBD_OK, wire->cookie);
    nbd_output_staged(&c->output, header + wire->length);
    return true;
}

/* A large read tries the page cache first, as the small ones do. */
static void submit_read(vx_nbd_connection *c, operation *op)
{
    prepare(c, &op->request, &op->wire);
    op->request.buffer = op->buffer;
    if (c->rules.structured && !(op->wire.flags & NBD_FLAG_DF)) {
        op->request.extents = op->extents;
        op->request.extent_capacity = READ_HOLES;
    }
    if (op->wire.length > INLINE_READ) {
        op->request.flags |= VX_NOWAIT;
        if (vx_submit(c->device, &op->request) == VX_DONE && op->request.not_before_ns == 0) {
            reply_operation(c, op);
            return;
        }
        op->request.flags &= ~(uint32_t)VX_NOWAIT;
        op->request.done = 0;
        op->request.extent_count = 0;
        op->request.not_before_ns = 0;
    }
    send_to_pool(c, op);
}

static enum outcome take_read(vx_nbd_connection *c, const nbd_request *wire)
{
    if (wire->length == 0) {
        reply_status(c, NBD_OK, wire);
        return TAKEN;
    }
    if (wire->length <= INLINE_READ && read_inline(c, wire))
        return TAKEN;
    operation *op;
    enum outcome outcome = start_operation(c, wire, wire->length, &op);
    if (outcome == TAKEN)
        submit_read(c, op);
    return outcome;
}

/* True when the write was answered inline. */
static bool write_inline(vx_nbd_connection *c, const nbd_request *wire, uint8_t *payload)
{
    vx_request request;
    if (wire->flags & NBD_FLAG_FUA)
        return false;
    prepare(c, &request, wire);
    request.flags |= VX_NOWAIT;
    request.buffer = payload;
    if (vx_submit(c->device, &request) != VX_DONE || request.not_before_ns != 0)
        return false;
    reply_status(c, nbd_error_of(request.result, wire), wire);
    return true;
}

static enum outcome take_write(vx_nbd_connection *c, const nbd_request *wire)
{
    size_t present = c->end - c->begin - NBD_REQUEST_BYTES;
    uint8_t *payload = c->input + c->begin + NBD_REQUEST_BYTES;
    if (wire->length <= present && write_inline(c, wire, payload)) {
        c->begin += wire->length;
        return TAKEN;
    }
    if (wire->length > present && wire->length <= INPUT_BYTES / 4)
        return SHORT; /* small: wait until it is here */
    operation *op;
    enum outcome outcome = start_operation(c, wire, wire->length, &op);
    if (outcome != TAKEN)
        return outcome;
    size_t part = present < wire->length ? present : wire->length;
    if (part > 0)
        memcpy(op->buffer, payload, part);
    c->begin += part;
    prepare(c, &op->request, wire);
    op->request.buffer = op->buffer;
    if (part == wire->length) {
        send_to_pool(c, op);
    } else {
        c->filling = op;
        c->filled = part;
    }
    return TAKEN;
}

static enum outcome take_other(vx_nbd_connection *c, const nbd_request *wire)
{
    if (wire->command == NBD_CACHE) { /* a hint, and the page cache decides for itself */
        reply_status(c, NBD_OK, wire);
        return TAKEN;
    }
    operation *op;
    enum outcome outcome = start_operation(c, wire, 0, &op);
    if (outcome != TAKEN)
        return outcome;
    prepare(c, &op->request, wire);
    if (wire->command == NBD_BLOCK_STATUS) {
        op->status = malloc(STATUS_EXTENTS * sizeof *op->status);
        if (op->status == NULL) {
            op->request.result = VX_E_NOMEM;
            reply_operation(c, op);
            return TAKEN;
        }
        op->request.extents = op->status;
        op->request.extent_capacity = STATUS_EXTENTS;
        op->request.flags |= VX_NOWAIT;
        if (vx_submit(c->device, &op->request) == VX_DONE) {
            reply_operation(c, op);
            return TAKEN;
        }
        op->request.flags &= ~(uint32_t)VX_NOWAIT;
        op->request.extent_count = 0;
    }
    send_to_pool(c, op);
    return TAKEN;
}

static void refuse(vx_nbd_connection *c, const nbd_request *wire, enum nbd_error error)
{
    c->discard = nbd_payload_of(wire);
    c->refused = *wire;
    c->refusal = error;
    if (c->discard == 0)
        reply_status(c, error, wire);
}

/* Takes the request at the front of the input, whose 28 bytes are there. */
static enum outcome take_request(vx_nbd_connection *c)
{
    nbd_request wire;
    if (!room_for_reply(c, INLINE_READ + 64 + STATUS_EXTENTS * 8))
        return HELD;
    if (c->gone || !nbd_parse_request(c->input + c->begin, &wire))
        return LOST;
    if (wire.command == NBD_DISCONNECT) {
        c->disconnecting = true;
        return TAKEN;
    }
    c->rules.size = vx_device_size(c->device);
    enum nbd_error error = nbd_validate(&wire, &c->rules);
    enum outcome outcome = TAKEN;
    if (error != NBD_OK)
        refuse(c, &wire, error);
    else if (wire.command == NBD_READ)
        outcome = take_read(c, &wire);
    else if (wire.command == NBD_WRITE)
        outcome = take_write(c, &wire);
    else
        outcome = take_other(c, &wire);
    if (outcome == LOST) { /* no memory: that request alone fails */
        refuse(c, &wire, NBD_ENOMEM);
        outcome = TAKEN;
    }
    if (outcome != TAKEN)
        return outcome;
    c->begin += NBD_REQUEST_BYTES;
    if (wire.command < 8)
        count(&c->counters.requests[wire.command], 1);
    if (error == NBD_OK && wire.command == NBD_READ)
        count(&c->counters.bytes_read, wire.length);
    if (error == NBD_OK && wire.command == NBD_WRITE)
        count(&c->counters.bytes_written, wire.length);
    return TAKEN;
}

static void discard_payload(vx_nbd_connection *c)
{
    size_t present = c->end - c->begin;
    size_t part = present < c->discard ? present : (size_t)c->discard;
    c->begin += part;
    c->discard -= part;
    if (c->discard == 0)
        reply_status(c, c->refusal, &c->refused);
}

/* Takes everything that can be taken. False: the connection is lost. */
static bool take_input(vx_nbd_connection *c)
{
    c->held = false;
    while (!c->disconnecting && c->filling == NULL) {
        if (c->discard > 0) {
            c->held = !room_for_reply(c, 64);
            if (c->begin == c->end || c->held)
                break;
            discard_payload(c);
            continue;
        }
        if (c->end - c->begin < NBD_REQUEST_BYTES)
            break;
        enum outcome outcome = take_request(c);
        if (outcome == LOST)
            return false;
        c->held = outcome == HELD;
        if (outcome != TAKEN)
            break;
    }
    return true;
}

static void take_completions(vx_nbd_connection *c)
{
    pthread_mutex_lock(&c->lock);
    operation *op = c->completed, *oldest_first = NULL;
    c->completed = NULL;
    if (c->signalled) {
        uint64_t ignored;
        while (read(c->wake, &ignored, sizeof ignored) < 0 && errno == EINTR)
            ;
        c->signalled = false;
    }
    pthread_mutex_unlock(&c->lock);
    while (op != NULL) {
        operation *next = op->next;
        op->next = oldest_first;
        oldest_first = op;
        op = next;
    }
    while (oldest_first != NULL && room_for_reply(c, (2 * READ_HOLES + 2) * 40 +
                                                         64 + STATUS_EXTENTS * 8)) {
        operation *next = oldest_first->next;
        reply_operation(c, oldest_first);
        oldest_first = next;
    }
    if (oldest_first != NULL) { /* the client does not read: keep them for later */
        pthread_mutex_lock(&c->lock);
        while (oldest_first != NULL) {
            operation *next = oldest_first->next;
            oldest_first->next = c->completed;
            c->completed = oldest_first;
            oldest_first = next;
        }
        pthread_mutex_unlock(&c->lock);
    }
}

/* ---- the socket ---- */

static bool wants_input(vx_nbd_connection *c)
{
    if (c->disconnecting || c->ended || c->output.bytes > OUTPUT_LIMIT)
        return false;
    if (c->filling != NULL)
        return true;
    /* A whole request that could not be taken waits for room, not for more bytes. */
    return c->end - c->begin < INPUT_BYTES && may_start(c, 0);
}

/* Reads once. False: the peer is done or gone. */
static bool receive(vx_nbd_connection *c, bool wait)
{
    struct iovec vector[2];
    struct msghdr message = {.msg_iov = vector};
    size_t rest = 0;
    if (c->begin > 0) {
        memmove(c->input, c->input + c->begin, c->end - c->begin);
        c->end -= c->begin;
        c->begin = 0;
    }
    if (c->filling != NULL) {
        rest = c->filling->wire.length - (size_t)c->filled;
        vector[message.msg_iovlen++] = (struct iovec){c->filling->buffer + c->filled, rest};
    }
    vector[message.msg_iovlen++] = (struct iovec){c->input + c->end, INPUT_BYTES - c->end};
    ssize_t n = recvmsg(c->fd, &message, wait ? 0 : MSG_DONTWAIT);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    if (n == 0)
        return false;
    size_t to_payload = (size_t)n < rest ? (size_t)n : rest;
    c->filled += to_payload;
    c->end += (size_t)n - to_payload;
    if (c->filling != NULL && to_payload == rest) {
        operation *op = c->filling;
        c->filling = NULL;
        op->request.flags |= VX_NOWAIT;
        if (!(op->wire.flags & NBD_FLAG_FUA) &&
            vx_submit(c->device, &op->request) == VX_DONE && op->request.not_before_ns == 0) {
            pthread_mutex_lock(&c->lock);
            op->next = c->completed;
            c->completed = op;
            pthread_mutex_unlock(&c->lock);
        } else {
            op->request.flags &= ~(uint32_t)VX_NOWAIT;
            op->request.done = 0;
            op->request.not_before_ns = 0;
            send_to_pool(c, op);
        }
    }
    return true;
}

/* Waits for the socket or a completion. False: the peer is gone. */
static bool wait_for_events(vx_nbd_connection *c)
{
    bool input = wants_input(c);
    bool starved = c->starved && c->filling == NULL;
    c->starved = false;
    if (input && !starved && c->under_way == 0 && c->output.bytes == 0)
        return receive(c, true);
    short events = (short)((input ? POLLIN : 0) | (c->output.bytes > 0 ? POLLOUT : 0));
    struct pollfd fds[2] = {{.fd = c->wake, .events = POLLIN},
                            {.fd = events != 0 && !c->gone ? c->fd : -1, .events = events}};
    /* Other connections' requests hold the memory: nobody wakes this one, so it looks again. */
    if (poll(fds, 2, starved ? STARVED_POLL_MS : -1) < 0)
        return errno == EINTR;
    if (input && fds[1].revents & (POLLIN | POLLERR | POLLHUP))
        return receive(c, false);
    if (fds[1].revents & (POLLERR | POLLHUP))
        c->gone = true;
    return true;
}

static void abandon_filling(vx_nbd_connection *c)
{
    if (c->filling != NULL)
        free_operation(c->filling, c);
    c->filling = NULL;
}

int vx_nbd_serve(vx_nbd_connection *c)
{
    for (;;) {
        if (atomic_load(&c->stopping) && c->filling == NULL)
            c->disconnecting = true;
        uint64_t under_way, waiting;
        if (!take_input(c)) {
            c->result = c->gone ? VX_E_IO : VX_E_PROTOCOL;
            c->disconnecting = true;
        }
        under_way = c->under_way;
        if (c->under_way > 0 || atomic_load(&c->stopping))
            take_completions(c);
        waiting = c->output.bytes;
        if (!c->gone && c->output.bytes > 0 && nbd_output_send(&c->output, c->fd) < 0)
            c->gone = true;
        if (c->gone) {
            c->disconnecting = true;
            nbd_output_release(&c->output);
            if (!nbd_output_initialise(&c->output, free_operation, c))
                c->output.staging = NULL;
        }
        if (c->disconnecting)
            abandon_filling(c);
        if (c->disconnecting && c->under_way == 0 && c->output.bytes == 0)
            return c->result;
        /* Room came up since the front request was refused: no event will say so again. */
        if (c->held && (c->under_way < under_way || c->output.bytes < waiting ||
                        (c->under_way == 0 && c->output.bytes == 0 && !c->starved)))
            continue;
        if (c->ended && !c->held && !c->disconnecting)
            c->disconnecting = true; /* everything that came whole was taken */
        else if (!wait_for_events(c))
            c->ended = true;
    }
}

void vx_nbd_stop(vx_nbd_connection *c)
{
    uint64_t one = 1;
    atomic_store(&c->stopping, true);
    shutdown(c->fd, SHUT_RD);
    pthread_mutex_lock(&c->lock);
    if (!c->signalled && write(c->wake, &one, sizeof one) == sizeof one)
        c->signalled = true;
    pthread_mutex_unlock(&c->lock);
}

void vx_nbd_abort(vx_nbd_connection *c)
{
    atomic_store(&c->stopping, true);
    shutdown(c->fd, SHUT_RDWR);
}

vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length)
{
    vx_nbd_connection *c = calloc(1, sizeof *c);
    if (c != NULL) {
        c->input = malloc(INPUT_BYTES);
        c->wake = eventfd(0, EFD_CLOEXEC);
    }
    if (c == NULL || c->input == NULL || c->wake < 0 || early_length > INPUT_BYTES ||
        !nbd_output_initialise(&c->output, free_operation, c)) {
        if (c != NULL) {
            free(c->input);
            if (c->wake >= 0)
                close(c->wake);
        }
        free(c);
        close(fd);
        return NULL;
    }
    memcpy(c->input, early, early_length);
    c->end = early_length;
    c->fd = fd;
    c->device = vx_device_reference(device);
    c->pool = pool;
    c->terms = *terms;
    c->rules = (nbd_terms){.size = vx_device_size(device),
                           .largest_payload = terms->largest_payload,
                           .read_only = terms->read_only,
                           .structured = terms->structured,
                           .block_status = terms->block_status};
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

void vx_nbd_counters_of(vx_nbd_connection *c, uint64_t *counters)
{
    for (int i = 0; i < 8; i++)
        counters[i] = atomic_load_explicit(&c->counters.requests[i], memory_order_relaxed);
    counters[8] = atomic_load_explicit(&c->counters.bytes_read, memory_order_relaxed);
    counters[9] = atomic_load_explicit(&c->counters.bytes_written, memory_order_relaxed);
    counters[10] = atomic_load_explicit(&c->counters.errors, memory_order_relaxed);
    counters[11] = atomic_load_explicit(&c->counters.pooled, memory_order_relaxed);
    counters[12] = atomic_load_explicit(&c->counters.under_way, memory_order_relaxed);
}

void vx_nbd_destroy(vx_nbd_connection *c)
{
    if (c == NULL)
        return;
    nbd_output_release(&c->output);
    for (uint32_t i = 0; i < c->spare_count; i++)
        free(c->spare[i]);
    pthread_mutex_lock(&c->lock); /* the last hand_back has left */
    pthread_mutex_unlock(&c->lock);
    pthread_mutex_destroy(&c->lock);
    close(c->wake);
    close(c->fd);
    vx_device_release(c->device);
    free(c->input);
    free(c);
}
