/* SPDX-License-Identifier: MIT */
#include "front/nbd_internal.h"

#include <stdlib.h>
#include <string.h>

enum outcome nbd_begin_task(vx_nbd_connection *c, transfer *command, const nbd_request *wire,
                                 enum vx_direction direction, size_t length, nbd_task **begun)
{
    vx_task *base;
    enum vx_beginning found = vx_service_begin(&c->service, sizeof **begun, direction, length,
                                               command == NULL, &base);
    if (found != VX_BEGUN)
        return found == VX_NO_ROOM ? HELD : LOST;
    nbd_task *task = (nbd_task *)base;
    task->wire = *wire;
    task->command = command;
    task->status = NULL;
    *begun = task;
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
    uint32_t operation = nbd_operation_of(wire->command), flags = 0;
    if (operation == VX_FLUSH) {
        vx_service_prepare(&c->service, request, operation, 0, 0, 0);
        return;
    }
    if (operation != VX_READ && operation != VX_EXTENTS)
        flags = (wire->flags & NBD_FLAG_FUA ? VX_FUA : 0) |
                (wire->flags & NBD_FLAG_NO_HOLE ? VX_NO_HOLE : 0) |
                (wire->flags & NBD_FLAG_FAST_ZERO ? VX_FAST : 0);
    vx_service_prepare(&c->service, request, operation, flags, wire->offset, wire->length);
}

/* Reads into the staging buffer, after the space for the header. False: not answered. */
static bool read_inline(vx_nbd_connection *c, const nbd_request *wire)
{
    vx_request request;
    bool structured = c->rules.structured;
    size_t header = structured ? NBD_CHUNK_BYTES + 8 : NBD_SIMPLE_REPLY_BYTES;
    uint8_t *out = vx_output_stage(&c->output);
    nbd_prepare(c, &request, wire);
    request.buffer = out + header;
    if (structured && !(wire->flags & NBD_FLAG_DF)) {
        request.extents = c->holes;
        request.extent_capacity = 1;
    }
    if (!vx_service_try_request(&c->service, &request))
        return false;
    if (request.result != 0) {
        nbd_reply_status(c, nbd_error_of(request.result, wire), wire);
        return true;
    }
    if (request.extent_count > 0 && request.extents[0].length == wire->length) {
        vx_output_staged(&c->output,
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
    vx_output_staged(&c->output, header + wire->length);
    return true;
}

/* A large read tries the page cache first, like a small one. */
static void submit_read(vx_nbd_connection *c, nbd_task *task)
{
    nbd_prepare(c, &task->base.request, &task->wire);
    task->base.request.buffer = task->base.buffer;
    if (c->rules.structured && !(task->wire.flags & NBD_FLAG_DF)) {
        task->base.request.extents = task->extents;
        task->base.request.extent_capacity = READ_HOLES;
    }
    if (task->wire.length > INLINE_READ && vx_service_try(&task->base))
        nbd_reply_task(c, task);
    else
        vx_service_submit(&task->base);
}

/* The next piece of a READ, or all of it if it needs a single reply. */
static nbd_request next_piece(const vx_nbd_connection *c, const transfer *command)
{
    nbd_request piece = command->wire;
    uint32_t rest = command->wire.length - command->begun;
    bool divisible = c->rules.structured && !(piece.flags & NBD_FLAG_DF);
    piece.offset += command->begun;
    piece.length = divisible && rest > VX_SERVICE_PIECE ? (uint32_t)VX_SERVICE_PIECE : rest;
    return piece;
}

void nbd_start_reads(vx_nbd_connection *c)
{
    c->starved = false;
    while (c->reads != NULL && !c->gone && c->output.bytes < UNSENT_LIMIT &&
           nbd_room_for_reply(c, REPLY_ROOM)) {
        transfer *command = c->reads;
        nbd_task *task = NULL;
        if (command->error != NBD_OK) /* a piece failed: nothing more is read */
            command->begun = command->wire.length;
        if (command->begun < command->wire.length) {
            nbd_request piece = next_piece(c, command);
            enum outcome outcome = nbd_begin_task(c, command, &piece, VX_TO_CLIENT, piece.length, &task);
            if (outcome == HELD) {
                c->starved = c->service.bytes[VX_TO_CLIENT] == 0;
                if (c->starved)
                    vx_pool_note_shortage(c->service.pool, vx_now_ns());
                return;
            }
            if (outcome == TAKEN) {
                command->begun += piece.length;
                command->tasks++;
            } else { /* no memory: that request alone fails */
                command->error = NBD_ENOMEM;
                command->begun = command->wire.length;
            }
        }
        if (command->begun == command->wire.length) {
            c->reads = command->next;
            if (c->reads == NULL)
                c->reads_end = &c->reads;
        }
        if (task != NULL) {
            submit_read(c, task);
        } else if (nbd_is_complete(command)) {
            if (command->error_sent)
                vx_output_staged(&c->output,
                                  nbd_put_chunk(vx_output_stage(&c->output), true, NBD_CHUNK_NONE,
                                                command->wire.cookie, 0));
            else
                nbd_reply_status(c, command->error, &command->wire);
            nbd_end_transfer(c, command);
        }
    }
}

void nbd_forget_reads(vx_nbd_connection *c)
{
    while (c->reads != NULL) {
        transfer *command = c->reads;
        c->reads = command->next;
        command->begun = command->wire.length;
        if (command->tasks == 0)
            nbd_end_transfer(c, command);
    }
    c->reads_end = &c->reads;
}

static transfer *new_transfer(vx_nbd_connection *c, const nbd_request *wire)
{
    transfer *command = calloc(1, sizeof *command);
    if (command == NULL)
        return NULL;
    command->wire = *wire;
    command->began_ns = vx_now_ns();
    vx_service_command_begins(&c->service);
    return command;
}

static enum outcome take_read(vx_nbd_connection *c, const nbd_request *wire)
{
    if (wire->length == 0) {
        nbd_reply_status(c, NBD_OK, wire);
        return TAKEN;
    }
    if (wire->length <= INLINE_READ && read_inline(c, wire))
        return TAKEN;
    if (!vx_service_may_begin(&c->service))
        return HELD;
    transfer *command = new_transfer(c, wire);
    if (command == NULL)
        return LOST;
    *c->reads_end = command;
    c->reads_end = &command->next;
    nbd_start_reads(c);
    return TAKEN;
}

/* True when the write was answered inline. */
static bool write_inline(vx_nbd_connection *c, const nbd_request *wire, uint8_t *payload)
{
    vx_request request;
    if (wire->flags & NBD_FLAG_FUA)
        return false;
    nbd_prepare(c, &request, wire);
    request.buffer = payload;
    if (!vx_service_try_request(&c->service, &request))
        return false;
    nbd_reply_status(c, nbd_error_of(request.result, wire), wire);
    return true;
}

/* Copies the part of a WRITE's payload that has arrived, `ahead` bytes into the input, to the
 * task's buffer. Runs the task if the payload is complete. */
static void fill(vx_nbd_connection *c, nbd_task *task, size_t ahead)
{
    size_t present = c->end - c->begin - ahead;
    size_t part = present < task->wire.length ? present : task->wire.length;
    if (part > 0)
        memcpy(task->base.buffer, c->input + c->begin + ahead, part);
    c->begin += part; /* the caller skips the `ahead` bytes */
    nbd_prepare(c, &task->base.request, &task->wire);
    task->base.request.buffer = task->base.buffer;
    c->filling = task;
    c->filled = part;
    if (part == task->wire.length)
        nbd_filled(c);
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
        return SHORT; /* small: wait for the whole payload */
    if (!vx_service_may_begin(&c->service))
        return HELD;
    if (wire->length > VX_SERVICE_PIECE) {
        c->writing = new_transfer(c, wire);
        return c->writing == NULL ? LOST : TAKEN; /* take_piece takes its payload */
    }
    nbd_task *task;
    enum outcome outcome = nbd_begin_task(c, NULL, wire, VX_FROM_CLIENT, wire->length, &task);
    if (outcome != TAKEN)
        return outcome;
    fill(c, task, NBD_REQUEST_BYTES);
    return TAKEN;
}

void nbd_filled(vx_nbd_connection *c)
{
    nbd_task *task = c->filling;
    c->filling = NULL;
    if (!(task->wire.flags & NBD_FLAG_FUA) && vx_service_try(&task->base))
        vx_service_put_back(&c->service, &task->base); /* answered with the other completed tasks */
    else
        vx_service_submit(&task->base);
}

/* Takes the next piece of c->writing from the input. */
static enum outcome take_piece(vx_nbd_connection *c)
{
    transfer *command = c->writing;
    uint32_t rest = command->wire.length - command->begun;
    if (command->error != NBD_OK) { /* the rest is received and discarded */
        c->discard = rest;
        c->discarding = command;
        c->writing = NULL;
        return TAKEN;
    }
    nbd_task *task;
    nbd_request piece = command->wire;
    piece.offset += command->begun;
    piece.length = rest > VX_SERVICE_PIECE ? (uint32_t)VX_SERVICE_PIECE : rest;
    piece.flags &= (uint16_t)~NBD_FLAG_FUA; /* a flush follows the last piece */
    enum outcome outcome = nbd_begin_task(c, command, &piece, VX_FROM_CLIENT, piece.length, &task);
    if (outcome == LOST) {
        command->error = NBD_ENOMEM;
        return TAKEN;
    }
    if (outcome != TAKEN)
        return outcome;
    command->begun += piece.length;
    command->tasks++;
    if (command->begun == command->wire.length)
        c->writing = NULL;
    fill(c, task, 0);
    return TAKEN;
}

void nbd_abandon_input(vx_nbd_connection *c)
{
    transfer *command = c->writing != NULL ? c->writing : c->discarding;
    c->writing = c->discarding = NULL;
    c->discard = 0;
    if (c->filling != NULL) {
        nbd_task *task = c->filling;
        c->filling = NULL;
        if (task->command != NULL) {
            command = task->command;
            command->tasks--;
        }
        nbd_free_task(task, c);
    }
    if (command == NULL)
        return;
    command->abandoned = true;
    command->begun = command->wire.length;
    nbd_reply_write(c, command);
}

static enum outcome take_other(vx_nbd_connection *c, const nbd_request *wire)
{
    if (wire->command == NBD_CACHE) { /* only a hint: nothing is read ahead */
        nbd_reply_status(c, NBD_OK, wire);
        return TAKEN;
    }
    nbd_task *task;
    if (!vx_service_may_begin(&c->service) || (wire->command == NBD_BLOCK_STATUS && c->statuses == MOST_STATUSES))
        return HELD;
    enum outcome outcome = nbd_begin_task(c, NULL, wire, VX_NO_PAYLOAD, 0, &task);
    if (outcome != TAKEN)
        return outcome;
    nbd_prepare(c, &task->base.request, wire);
    if (wire->command == NBD_BLOCK_STATUS) {
        task->status = malloc(STATUS_EXTENTS * sizeof *task->status);
        if (task->status == NULL) {
            task->base.request.result = VX_E_NOMEM;
            nbd_reply_task(c, task);
            return TAKEN;
        }
        c->statuses++;
        task->base.request.extents = task->status;
        task->base.request.extent_capacity = STATUS_EXTENTS;
        if (vx_service_try(&task->base)) {
            nbd_reply_task(c, task);
            return TAKEN;
        }
    }
    vx_service_submit(&task->base);
    return TAKEN;
}

static void refuse(vx_nbd_connection *c, const nbd_request *wire, enum nbd_error error)
{
    c->discard = nbd_payload_of(wire);
    c->refused = *wire;
    c->refusal = error;
    if (c->discard == 0)
        nbd_reply_status(c, error, wire);
}

/* Takes the request at the front of the input, whose 28-byte header has arrived. */
static enum outcome take_request(vx_nbd_connection *c)
{
    nbd_request wire;
    if (!nbd_room_for_reply(c, INLINE_READ + 64 + STATUS_EXTENTS * 8))
        return HELD;
    if (c->gone || !nbd_parse_request(c->input + c->begin, &wire))
        return LOST;
    if (wire.command == NBD_DISCONNECT) {
        c->disconnecting = true;
        return TAKEN;
    }
    c->rules.size = vx_device_size(c->service.device);
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
        nbd_count(&c->counters.requests[wire.command], 1);
    if (error == NBD_OK && vx_service_is_metered(&c->service))
        vx_meter_offer(c->service.meter, nbd_operation_of(wire.command), wire.length);
    if (error == NBD_OK && wire.command == NBD_READ)
        nbd_count(&c->counters.bytes_read, wire.length);
    if (error == NBD_OK && wire.command == NBD_WRITE)
        nbd_count(&c->counters.bytes_written, wire.length);
    return TAKEN;
}

static void discard_payload(vx_nbd_connection *c)
{
    size_t present = c->end - c->begin;
    size_t part = present < c->discard ? present : (size_t)c->discard;
    c->begin += part;
    c->discard -= part;
    if (c->discard > 0)
        return;
    transfer *command = c->discarding;
    c->discarding = NULL;
    if (command == NULL) {
        nbd_reply_status(c, c->refusal, &c->refused);
    } else {
        command->begun = command->wire.length;
        nbd_reply_write(c, command);
    }
}

bool nbd_take_input(vx_nbd_connection *c)
{
    c->held = false;
    while (!c->disconnecting && c->filling == NULL) {
        if (c->discard > 0) {
            c->held = !nbd_room_for_reply(c, 64);
            if (c->begin == c->end || c->held)
                break;
            discard_payload(c);
            continue;
        }
        if (c->writing == NULL && c->end - c->begin < NBD_REQUEST_BYTES)
            break;
        enum outcome outcome = c->writing != NULL ? take_piece(c) : take_request(c);
        if (outcome == LOST)
            return false;
        c->held = outcome == HELD;
        if (outcome != TAKEN)
            break;
    }
    return true;
}
