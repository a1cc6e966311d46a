/* SPDX-License-Identifier: MIT */
#include "front/nbd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
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
    /* A whole request that could not be taken waits for room, not for more bytes. */
    return c->end - c->begin < INPUT_BYTES && !c->held && nbd_may_take(c);
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
    c->moved_ns = vx_now_ns();
    if (c->filling != NULL && to_payload == rest)
        nbd_filled(c);
    return true;
}

/* True if its client has not moved for a long time, and another connection waits for the memory that this
 * one borrows. */
static bool is_in_the_way(const vx_nbd_connection *c)
{
    uint64_t now = vx_now_ns(), since = vx_pool_shortage_since(c->pool, now);
    bool client_is_asked = c->output.bytes > 0 || c->filling != NULL;
    return c->borrowed > 0 && client_is_asked && since != 0 && now - since > VX_NBD_STALL_NS &&
           now - c->moved_ns > VX_NBD_STALL_NS;
}

/* Waits for the socket or a completion. False: the peer is gone. */
static bool wait_for_events(vx_nbd_connection *c)
{
    bool input = wants_input(c);
    bool starved = c->starved;
    if (input && !starved && c->under_way == 0 && c->output.bytes == 0 && c->filling == NULL)
        return receive(c, true);
    short events = (short)((input ? POLLIN : 0) | (c->output.bytes > 0 ? POLLOUT : 0));
    /* Of a client whose requests a throttle holds up: whether it is still there. */
    bool look = events != 0 || (nbd_is_paced(c) && c->under_way > 0 && !c->dropped);
    struct pollfd fds[2] = {{.fd = c->wake, .events = POLLIN},
                            {.fd = look && !c->gone ? c->fd : -1, .events = events}};
    /* Other connections' requests hold the memory: nobody wakes this one, so it looks again. */
    int timeout = starved ? STARVED_POLL_MS : c->borrowed > 0 ? STALL_POLL_MS : -1;
    if (poll(fds, 2, timeout) < 0)
        return errno == EINTR;
    if (input && fds[1].revents & (POLLIN | POLLERR | POLLHUP))
        return receive(c, false);
    bool in_the_way = is_in_the_way(c);
    if (fds[1].revents & (POLLERR | POLLHUP) || in_the_way)
        c->gone = true;
    if (in_the_way)
        c->result = VX_E_CANCELLED;
    return true;
}

int vx_nbd_serve(vx_nbd_connection *c)
{
    for (;;) {
        if (atomic_load(&c->stopping) && c->filling == NULL && c->writing == NULL)
            c->disconnecting = true;
        uint64_t freed, waiting;
        if (!nbd_take_input(c)) {
            c->result = c->gone ? VX_E_IO : VX_E_PROTOCOL;
            c->disconnecting = true;
        }
        freed = c->freed;
        bool left = false;
        if (c->under_way > 0 || atomic_load(&c->stopping))
            left = nbd_take_completions(c);
        nbd_start_reads(c);
        waiting = c->output.bytes;
        if (!c->gone && c->output.bytes > 0 && nbd_output_send(&c->output, c->fd) < 0)
            c->gone = true;
        if (c->output.bytes < waiting)
            c->moved_ns = vx_now_ns();
        if (c->gone) {
            c->disconnecting = true;
            nbd_output_release(&c->output);
            if (!nbd_output_initialise(&c->output, nbd_free_operation, c))
                c->output.staging = NULL;
        }
        if (c->disconnecting)
            nbd_abandon_input(c);
        if (c->gone)
            nbd_forget_reads(c);
        if ((c->gone || atomic_load(&c->stopping)) && !c->hurried && nbd_is_paced(c)) {
            c->hurried = true; /* nobody is to wait for what is held up */
            c->device->operations->hurry(c->device, !atomic_load(&c->stopping));
        }
        if (c->gone && !c->dropped)
            nbd_drop(c);
        if (c->disconnecting && c->under_way == 0 && c->output.bytes == 0)
            return c->result;
        /* Room came up since a request found none: no event will say so again. */
        if ((c->held || left || c->reads != NULL) &&
            (c->freed != freed || c->output.bytes < waiting ||
             (c->operations == 0 && c->output.bytes == 0 && !c->starved)))
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
        !nbd_output_initialise(&c->output, nbd_free_operation, c)) {
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
    c->reads_end = &c->reads;
    c->moved_ns = vx_now_ns();
    c->terms = *terms;
    c->rules = (nbd_terms){.size = vx_device_size(device),
                           .largest_payload = terms->largest_payload,
                           .read_only = terms->read_only,
                           .structured = terms->structured,
                           .block_status = terms->block_status};
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

void vx_nbd_set_meter(vx_nbd_connection *c, vx_meter *meter)
{
    c->meter = meter;
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
