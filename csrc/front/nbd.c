/* SPDX-License-Identifier: MIT */
#include "front/nbd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "front/nbd_internal.h"

static bool wants_input(vx_nbd_connection *c)
{
    if (c->disconnecting || c->ended || c->output.bytes > OUTPUT_LIMIT)
        return false;
    if (c->filling != NULL)
        return true;
    if (c->discard > 0)
        return !c->held;
    /* A held request waits for room, not for more input. */
    return c->end - c->begin < INPUT_BYTES && !c->held && vx_service_may_begin(&c->service);
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
        vector[message.msg_iovlen++] = (struct iovec){c->filling->base.buffer + c->filled, rest};
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
    c->moved_ns = vx_now_ns();
    if (c->filling != NULL && to_payload == rest)
        nbd_filled(c);
    return true;
}

/* Waits for the socket or a completion. False: the peer is gone. */
static bool wait_for_events(vx_nbd_connection *c)
{
    vx_service *s = &c->service;
    bool input = wants_input(c);
    bool starved = c->starved;
    if (input && !starved && s->under_way == 0 && c->output.bytes == 0 && c->filling == NULL)
        return receive(c, true);
    short events = (short)((input ? POLLIN : 0) | (c->output.bytes > 0 ? POLLOUT : 0));
    /* While a throttle holds requests back, also check that the client is still connected. */
    bool check = events != 0 || (vx_service_is_paced(s) && s->under_way > 0 && !c->gone);
    struct pollfd fds[2] = {{.fd = s->wake, .events = POLLIN},
                            {.fd = check && !c->gone ? c->fd : -1, .events = events}};
    /* Other connections hold the memory and do not wake this one, so it polls. */
    int timeout = starved ? STARVED_POLL_MS : s->borrowed > 0 ? STALL_POLL_MS : -1;
    if (poll(fds, 2, timeout) < 0)
        return errno == EINTR;
    if (input && fds[1].revents & (POLLIN | POLLERR | POLLHUP))
        return receive(c, false);
    bool client_is_asked = c->output.bytes > 0 || c->filling != NULL;
    bool in_the_way = client_is_asked && vx_service_is_in_the_way(s, c->moved_ns);
    if (fds[1].revents & (POLLERR | POLLHUP) || in_the_way)
        c->gone = true;
    if (in_the_way) {
        c->result = VX_E_CANCELLED;
        c->disconnecting = true; /* no request that has arrived is taken any more */
    }
    return true;
}

int vx_nbd_serve(vx_nbd_connection *c)
{
    vx_service *s = &c->service;
    for (;;) {
        if (atomic_load(&c->stopping) && c->filling == NULL && c->writing == NULL)
            c->disconnecting = true;
        uint64_t freed, waiting;
        if (!nbd_take_input(c)) {
            c->result = c->gone ? VX_E_IO : VX_E_PROTOCOL;
            c->disconnecting = true;
        }
        freed = s->freed;
        bool left = false;
        if (s->under_way > 0 || atomic_load(&c->stopping))
            left = nbd_take_completions(c);
        nbd_start_reads(c);
        waiting = c->output.bytes;
        if (!c->gone && c->output.bytes > 0 && vx_output_send(&c->output, c->fd) < 0)
            c->gone = true;
        if (c->output.bytes < waiting)
            c->moved_ns = vx_now_ns();
        if (c->gone) {
            c->disconnecting = true;
            vx_output_release(&c->output);
            if (!vx_output_initialise(&c->output, nbd_free_task, c))
                c->output.staging = NULL;
        }
        if (c->disconnecting)
            nbd_abandon_input(c);
        if (c->gone)
            nbd_forget_reads(c);
        if (atomic_load(&c->stopping))
            vx_service_drain(s, false); /* the server ends: no request waits any longer */
        if (c->gone)
            vx_service_drop(s);
        if (c->disconnecting && s->under_way == 0 && c->output.bytes == 0)
            return c->result;
        /* Room was freed after a request found none. No further event reports that, so try
         * again. */
        if ((c->held || left || c->reads != NULL) &&
            (s->freed != freed || c->output.bytes < waiting ||
             (s->tasks == 0 && c->output.bytes == 0 && !c->starved)))
            continue;
        if (c->ended && !c->held && !c->disconnecting)
            c->disconnecting = true; /* every complete request was taken */
        else if (!wait_for_events(c))
            c->ended = true;
    }
}

void vx_nbd_stop(vx_nbd_connection *c)
{
    atomic_store(&c->stopping, true);
    shutdown(c->fd, SHUT_RD);
    vx_service_wake(&c->service);
}

void vx_nbd_abort(vx_nbd_connection *c)
{
    atomic_store(&c->stopping, true);
    shutdown(c->fd, SHUT_RDWR);
}

/* Makes the input and output buffers. False: no memory. */
static bool make_buffers(vx_nbd_connection *c)
{
    c->input = malloc(INPUT_BYTES);
    if (c->input != NULL && vx_output_initialise(&c->output, nbd_free_task, c))
        return true;
    free(c->input);
    return false;
}

static vx_nbd_connection *make(vx_device *device, vx_pool *pool, const vx_nbd_terms *terms)
{
    const vx_service_terms limits = {terms->requests_limit, terms->bytes_limit};
    vx_nbd_connection *c = calloc(1, sizeof *c);
    if (c == NULL)
        return NULL;
    if (!make_buffers(c)) {
        free(c);
        return NULL;
    }
    c->initiator.epoch_slot = terms->epoch_slot;
    if (!vx_service_initialise(&c->service, device, pool, &c->initiator, &limits)) {
        vx_output_release(&c->output);
        free(c->input);
        free(c);
        return NULL;
    }
    return c;
}

vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length)
{
    vx_nbd_connection *c = early_length > INPUT_BYTES ? NULL : make(device, pool, terms);
    if (c == NULL) {
        close(fd);
        return NULL;
    }
    memcpy(c->input, early, early_length);
    c->end = early_length;
    c->fd = fd;
    c->reads_end = &c->reads;
    c->moved_ns = vx_now_ns();
    c->context_id = terms->context_id;
    c->rules = (nbd_terms){.size = vx_device_size(device),
                           .largest_payload = terms->largest_payload,
                           .read_only = terms->read_only,
                           .structured = terms->structured,
                           .block_status = terms->block_status};
    return c;
}

void vx_nbd_set_meter(vx_nbd_connection *c, vx_meter *meter)
{
    c->service.meter = meter;
}

static uint64_t value(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

void vx_nbd_counters_of(vx_nbd_connection *c, vx_nbd_counters *counters)
{
    for (int i = 0; i < 8; i++)
        counters->requests[i] = value(&c->counters.requests[i]);
    counters->bytes_read = value(&c->counters.bytes_read);
    counters->bytes_written = value(&c->counters.bytes_written);
    counters->errors = value(&c->counters.errors);
    counters->failed_writes = value(&c->counters.failed_writes);
    counters->pooled = value(&c->service.pooled);
    counters->under_way = value(&c->service.under_way);
}

void vx_nbd_destroy(vx_nbd_connection *c)
{
    if (c == NULL)
        return;
    vx_output_release(&c->output);
    vx_service_release(&c->service);
    close(c->fd);
    free(c->input);
    free(c);
}
