/* SPDX-License-Identifier: MIT */
#include "front/nbd_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void nbd_reply_status(vx_nbd_connection *c, enum nbd_error error, const nbd_request *wire)
{
    uint8_t *out = nbd_output_stage(&c->output);
    size_t n;
    if (error != NBD_OK)
        nbd_count(&c->counters.errors, 1);
    if (!c->rules.structured)
        n = nbd_put_simple(out, error, wire->cookie);
    else if (error != NBD_OK)
        n = nbd_put_error(out, true, wire->cookie, error);
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

/* A read whose data stand in op->buffer, with holes that were not filled in. `last`: nothing of the
 * request follows. */
static void reply_read(vx_nbd_connection *c, operation *op, bool last)
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
        bool end = stop == length;
        uint8_t *out = nbd_output_stage(&c->output);
        uint32_t n = (uint32_t)(stop - at);
        uint64_t offset = wire->offset + at;
        nbd_output_staged(&c->output,
                          is_hole ? nbd_put_hole(out, end && last, wire->cookie, offset, n)
                                  : nbd_put_data(out, end && last, wire->cookie, offset, n));
        if (!is_hole)
            nbd_output_refer(&c->output, op->buffer + at, n, end ? op : NULL);
        else if (end)
            nbd_output_refer(&c->output, op->buffer, 0, op);
        at = stop;
    }
}

/* The whole request is done; it is not under way any more. */
void nbd_end_transfer(vx_nbd_connection *c, transfer *command)
{
    if (command->began_ns != 0 && vx_meter_is_on(c->meter))
        vx_meter_note(c->meter, nbd_operation_of(command->wire.command), command->wire.length,
                      vx_now_ns() - command->began_ns, command->queued_ns);
    free(command);
    nbd_answered(c);
}

bool nbd_is_complete(const transfer *command)
{
    return command->operations == 0 && command->begun == command->wire.length;
}

/* A piece of a READ is here: sends it. Other pieces may come before and after. */
static void reply_piece(vx_nbd_connection *c, operation *op)
{
    transfer *command = op->command;
    enum nbd_error error = nbd_error_of(op->request.result, &op->wire);
    if (command->error == NBD_OK)
        command->error = error;
    bool last = nbd_is_complete(command), sent = false;
    if (c->gone) {
        /* nobody listens */
    } else if (error == NBD_OK) {
        reply_read(c, op, last);
        sent = true;
    } else if (c->rules.structured) {
        command->said = true;
        nbd_count(&c->counters.errors, 1);
        nbd_output_staged(&c->output, nbd_put_error(nbd_output_stage(&c->output), last,
                                                    command->wire.cookie, error));
    } else {
        nbd_reply_status(c, error, &command->wire);
    }
    if (!sent)
        nbd_free_operation(op, c);
    if (last)
        nbd_end_transfer(c, command);
}

/* Answers a WRITE in pieces, when all of it is done; with FUA after a flush. */
void nbd_reply_write(vx_nbd_connection *c, transfer *command)
{
    operation *op;
    bool wants_flush = command->wire.flags & NBD_FLAG_FUA && command->error == NBD_OK;
    if (!nbd_is_complete(command))
        return;
    if (wants_flush && !command->flushed && !command->abandoned && !c->gone) {
        command->flushed = true;
        if (nbd_start_operation(c, command, &command->wire, OTHER, 0, &op) == TAKEN) {
            nbd_request flush = {.command = NBD_FLUSH};
            nbd_prepare(c, &op->request, &flush);
            command->operations++;
            nbd_send_to_pool(c, op);
            return;
        }
        command->error = NBD_ENOMEM;
    }
    if (!c->gone && !command->abandoned)
        nbd_reply_status(c, command->error, &command->wire);
    nbd_end_transfer(c, command);
}

void nbd_reply_operation(vx_nbd_connection *c, operation *op)
{
    enum nbd_error error = nbd_error_of(op->request.result, &op->wire);
    transfer *command = op->command;
    if (command != NULL) {
        command->operations--;
        if (op->request.queued_ns > command->queued_ns) /* pieces wait side by side */
            command->queued_ns = op->request.queued_ns;
        if (command->wire.command == NBD_READ) {
            reply_piece(c, op);
            return;
        }
        if (command->error == NBD_OK)
            command->error = error;
        nbd_free_operation(op, c);
        nbd_reply_write(c, command);
        return;
    }
    uint64_t began = op->began_ns != 0 ? op->began_ns : op->request.arrived_ns;
    if (began != 0 && vx_meter_is_on(c->meter))
        vx_meter_note(c->meter, op->request.operation, op->wire.length, vx_now_ns() - began,
                      op->request.queued_ns);
    if (c->gone) {
        /* nobody listens */
    } else if (error == NBD_OK && op->wire.command == NBD_BLOCK_STATUS) {
        reply_block_status(c, &op->wire, op->status, op->request.extent_count);
    } else {
        nbd_reply_status(c, error, &op->wire);
    }
    nbd_free_operation(op, c);
}

bool nbd_room_for_reply(vx_nbd_connection *c, size_t staged)
{
    if (nbd_output_fits(&c->output, staged, 2 * READ_HOLES + 4))
        return true;
    if (nbd_output_send(&c->output, c->fd) < 0)
        c->gone = true;
    return c->gone || nbd_output_fits(&c->output, staged, 2 * READ_HOLES + 4);
}

bool nbd_take_completions(vx_nbd_connection *c)
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
    while (oldest_first != NULL && nbd_room_for_reply(c, REPLY_ROOM)) {
        operation *next = oldest_first->next;
        nbd_reply_operation(c, oldest_first);
        oldest_first = next;
    }
    if (oldest_first == NULL)
        return false;
    pthread_mutex_lock(&c->lock); /* the client does not read: keep them for later */
    while (oldest_first != NULL) {
        operation *next = oldest_first->next;
        oldest_first->next = c->completed;
        c->completed = oldest_first;
        oldest_first = next;
    }
    pthread_mutex_unlock(&c->lock);
    return true;
}
