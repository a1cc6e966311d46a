/* SPDX-License-Identifier: MIT */
#include "front/nbd_internal.h"

#include <stdlib.h>

void nbd_reply_status(vx_nbd_connection *c, enum nbd_error error, const nbd_request *wire)
{
    uint8_t *out = vx_output_stage(&c->output);
    size_t n;
    if (error != NBD_OK) {
        nbd_count(&c->counters.errors, 1);
        if (wire->command == NBD_WRITE || wire->command == NBD_WRITE_ZEROES ||
            wire->command == NBD_FLUSH)
            nbd_count(&c->counters.failed_writes, 1);
    }
    if (!c->rules.structured)
        n = nbd_put_simple(out, error, wire->cookie);
    else if (error != NBD_OK)
        n = nbd_put_error(out, true, wire->cookie, error);
    else if (wire->command == NBD_READ) /* zero length: a READ must not get a simple reply */
        n = nbd_put_chunk(out, true, NBD_CHUNK_NONE, wire->cookie, 0);
    else
        n = nbd_put_simple(out, NBD_OK, wire->cookie);
    vx_output_staged(&c->output, n);
}

static void reply_block_status(vx_nbd_connection *c, const nbd_request *wire,
                               const vx_extent *extents, uint32_t extent_count)
{
    uint8_t *out = vx_output_stage(&c->output), *at = out + NBD_CHUNK_BYTES + 4;
    uint32_t flags = 0, length = 0, written = 0;
    uint32_t limit = wire->flags & NBD_FLAG_REQ_ONE ? 1 : STATUS_EXTENTS;
    for (uint32_t i = 0; i < extent_count; i++) {
        uint32_t state = extents[i].state == VX_EXTENT_DATA ? 0 : NBD_STATE_HOLE | NBD_STATE_ZERO;
        if (length > 0 && state == flags) {
            length += (uint32_t)extents[i].length; /* at most the request's 32-bit length */
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
    nbd_put_u32(out + NBD_CHUNK_BYTES, c->context_id);
    vx_output_staged(&c->output, (size_t)(at - out));
}

/* Answers with the data in task->base.buffer and with the holes that were not filled in. `last`:
 * nothing of the request follows. */
static void reply_read(vx_nbd_connection *c, nbd_task *task, bool last)
{
    const nbd_request *wire = &task->wire;
    uint64_t at = 0, length = wire->length;
    uint32_t hole = 0, holes = task->base.request.extent_count;
    if (!c->rules.structured) {
        vx_output_staged(&c->output,
                          nbd_put_simple(vx_output_stage(&c->output), NBD_OK, wire->cookie));
        vx_output_refer(&c->output, task->base.buffer, length, task);
        return;
    }
    while (at < length) {
        uint64_t stop = hole < holes ? task->extents[hole].offset - wire->offset : length;
        bool is_hole = stop == at;
        if (is_hole)
            stop = at + task->extents[hole++].length;
        bool end = stop == length;
        uint8_t *out = vx_output_stage(&c->output);
        uint32_t n = (uint32_t)(stop - at);
        uint64_t offset = wire->offset + at;
        vx_output_staged(&c->output,
                          is_hole ? nbd_put_hole(out, end && last, wire->cookie, offset, n)
                                  : nbd_put_data(out, end && last, wire->cookie, offset, n));
        if (!is_hole)
            vx_output_refer(&c->output, task->base.buffer + at, n, end ? task : NULL);
        else if (end)
            vx_output_refer(&c->output, task->base.buffer, 0, task);
        at = stop;
    }
}

void nbd_end_transfer(vx_nbd_connection *c, transfer *command)
{
    vx_service_note(&c->service, nbd_operation_of(command->wire.command), command->wire.length,
                    command->began_ns, command->queued_ns);
    free(command);
    vx_service_command_ends(&c->service);
}

bool nbd_is_complete(const transfer *command)
{
    return command->tasks == 0 && command->begun == command->wire.length;
}

/* A piece of a READ is done: sends it. Pieces may be sent in any order. */
static void reply_piece(vx_nbd_connection *c, nbd_task *task)
{
    transfer *command = task->command;
    enum nbd_error error = nbd_error_of(task->base.request.result, &task->wire);
    if (command->error == NBD_OK)
        command->error = error;
    bool last = nbd_is_complete(command), sent = false;
    if (c->gone) {
        /* no reply: the client is gone */
    } else if (error == NBD_OK) {
        reply_read(c, task, last);
        sent = true;
    } else if (c->rules.structured) {
        command->error_sent = true;
        nbd_count(&c->counters.errors, 1);
        vx_output_staged(&c->output, nbd_put_error(vx_output_stage(&c->output), last,
                                                    command->wire.cookie, error));
    } else {
        nbd_reply_status(c, error, &command->wire);
    }
    if (!sent)
        nbd_free_task(task, c);
    if (last)
        nbd_end_transfer(c, command);
}

void nbd_free_task(void *owner, void *context)
{
    nbd_task *task = owner;
    vx_nbd_connection *c = context;
    if (task->status != NULL)
        c->statuses--;
    free(task->status);
    vx_service_free(&task->base);
}

void nbd_reply_write(vx_nbd_connection *c, transfer *command)
{
    nbd_task *task;
    bool wants_flush = command->wire.flags & NBD_FLAG_FUA && command->error == NBD_OK;
    if (!nbd_is_complete(command))
        return;
    if (wants_flush && !command->flushed && !command->abandoned && !c->gone) {
        command->flushed = true;
        if (nbd_begin_task(c, command, &command->wire, VX_NO_PAYLOAD, 0, &task) == TAKEN) {
            nbd_request flush = {.command = NBD_FLUSH};
            nbd_prepare(c, &task->base.request, &flush);
            command->tasks++;
            vx_service_submit(&task->base);
            return;
        }
        command->error = NBD_ENOMEM;
    }
    if (!c->gone && !command->abandoned)
        nbd_reply_status(c, command->error, &command->wire);
    nbd_end_transfer(c, command);
}

void nbd_reply_task(vx_nbd_connection *c, nbd_task *task)
{
    enum nbd_error error = nbd_error_of(task->base.request.result, &task->wire);
    transfer *command = task->command;
    if (command != NULL) {
        command->tasks--;
        if (task->base.request.queued_ns > command->queued_ns) /* pieces wait in parallel */
            command->queued_ns = task->base.request.queued_ns;
        if (command->wire.command == NBD_READ) {
            reply_piece(c, task);
            return;
        }
        if (command->error == NBD_OK)
            command->error = error;
        nbd_free_task(task, c);
        nbd_reply_write(c, command);
        return;
    }
    vx_service_note(&c->service, task->base.request.operation, task->wire.length, task->base.began_ns,
                    task->base.request.queued_ns);
    if (c->gone) {
        /* no reply: the client is gone */
    } else if (error == NBD_OK && task->wire.command == NBD_BLOCK_STATUS) {
        reply_block_status(c, &task->wire, task->status, task->base.request.extent_count);
    } else {
        nbd_reply_status(c, error, &task->wire);
    }
    nbd_free_task(task, c);
}

bool nbd_room_for_reply(vx_nbd_connection *c, size_t staged)
{
    if (vx_output_fits(&c->output, staged, 2 * READ_HOLES + 4))
        return true;
    if (vx_output_send(&c->output, c->fd) < 0)
        c->gone = true;
    return c->gone || vx_output_fits(&c->output, staged, 2 * READ_HOLES + 4);
}

bool nbd_take_completions(vx_nbd_connection *c)
{
    vx_task *task = vx_service_take_completed(&c->service);
    while (task != NULL && nbd_room_for_reply(c, REPLY_ROOM)) {
        vx_task *next = task->next;
        nbd_reply_task(c, (nbd_task *)task);
        task = next;
    }
    if (task != NULL)
        vx_service_put_back(&c->service, task); /* the client does not read: keep them for later */
    return task != NULL;
}
