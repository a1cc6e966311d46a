/* SPDX-License-Identifier: MIT */
#include "front/service.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/run.h"

/* The limit of payload in flight while a throttle holds requests back. */
#define HELD_BYTES ((uint64_t)4 << 20)
/* Buffers of at least this size are rounded up to a piece, so that they can be reused. */
#define ROUNDED_BYTES 65536u

static void count(_Atomic uint64_t *counter, uint64_t value)
{
    atomic_store_explicit(counter, value, memory_order_relaxed);
}

static uint64_t counted(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

/* ---- life ---- */

bool vx_service_initialise(vx_service *s, vx_device *device, vx_pool *pool,
                           const vx_initiator *initiator, const vx_service_terms *terms)
{
    memset(s, 0, sizeof *s);
    s->wake = eventfd(0, EFD_CLOEXEC);
    if (s->wake < 0)
        return false;
    s->device = vx_device_reference(device);
    s->pool = pool;
    s->initiator = initiator;
    s->terms = *terms;
    pthread_mutex_init(&s->lock, NULL);
    return true;
}

void vx_service_release(vx_service *s)
{
    for (uint32_t i = 0; i < s->spare_count; i++)
        free(s->spare[i]);
    pthread_mutex_lock(&s->lock); /* wait for the last hand_back to leave */
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_destroy(&s->lock);
    close(s->wake);
    vx_device_release(s->device);
}

/* Writes under the lock, so that the service cannot be released meanwhile. */
static void signal_locked(vx_service *s)
{
    uint64_t one = 1;
    if (s->signalled)
        return;
    s->signalled = true;
    while (write(s->wake, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void vx_service_wake(vx_service *s)
{
    pthread_mutex_lock(&s->lock);
    signal_locked(s);
    pthread_mutex_unlock(&s->lock);
}

/* ---- memory ---- */

void vx_service_command_begins(vx_service *s)
{
    count(&s->under_way, counted(&s->under_way) + 1);
}

void vx_service_command_ends(vx_service *s)
{
    count(&s->under_way, counted(&s->under_way) - 1);
}

bool vx_service_may_begin(const vx_service *s)
{
    return counted(&s->under_way) < s->terms.commands_limit;
}

bool vx_service_is_paced(const vx_service *s)
{
    return s->device->operations->paces;
}

/* Whether the connection's own limit allows `capacity` more bytes of payload. The first piece in
 * each direction is always allowed. */
static bool is_within_limit(const vx_service *s, enum vx_direction direction, size_t capacity)
{
    uint64_t limit = s->terms.bytes_limit;
    if (limit > HELD_BYTES && vx_service_is_paced(s) &&
        s->device->operations->is_holding(s->device))
        limit = HELD_BYTES;
    return s->bytes[direction] == 0 || s->bytes[0] + s->bytes[1] + capacity <= limit;
}

/* Takes the connection's own memory of that direction, or borrows from the pool. False: neither has
 * room. */
static bool reserve(vx_service *s, vx_task *task)
{
    if (task->direction == VX_NO_PAYLOAD)
        return true;
    if (!is_within_limit(s, task->direction, task->capacity))
        return false;
    task->is_own = task->capacity <= VX_SERVICE_PIECE && !s->own_used[task->direction];
    if (task->is_own) {
        s->own_used[task->direction] = true;
    } else {
        bool limited = vx_service_is_paced(s) && s->device->operations->is_limited(s->device);
        if (!vx_pool_charge(s->pool, task->capacity, limited))
            return false;
        task->charged = task->capacity;
        s->borrowed += task->charged;
    }
    s->bytes[task->direction] += task->capacity;
    return true;
}

static uint8_t *take_buffer(vx_service *s, size_t capacity)
{
    if (capacity == VX_SERVICE_PIECE && s->spare_count > 0)
        return s->spare[--s->spare_count];
    return malloc(capacity);
}

enum vx_beginning vx_service_begin(vx_service *s, size_t size, enum vx_direction direction,
                                   size_t length, bool is_command, vx_task **begun)
{
    vx_task *task = malloc(size);
    if (task == NULL)
        return VX_NO_MEMORY;
    memset(task, 0, sizeof *task);
    task->service = s;
    task->direction = direction;
    task->is_command = is_command;
    task->capacity = length > ROUNDED_BYTES && length < VX_SERVICE_PIECE ? VX_SERVICE_PIECE : length;
    if (!reserve(s, task)) {
        free(task);
        return VX_NO_ROOM;
    }
    s->tasks++;
    if (is_command) {
        vx_service_command_begins(s);
        task->began_ns = vx_now_ns();
    }
    if (length > 0 && (task->buffer = take_buffer(s, task->capacity)) == NULL) {
        vx_service_free(task);
        return VX_NO_MEMORY;
    }
    *begun = task;
    return VX_BEGUN;
}

void vx_service_free(vx_task *task)
{
    vx_service *s = task->service;
    s->tasks--;
    s->freed++;
    if (task->charged > 0) {
        vx_pool_discharge(s->pool, task->charged);
        s->borrowed -= task->charged;
    }
    if (task->direction != VX_NO_PAYLOAD) {
        s->bytes[task->direction] -= task->capacity;
        if (task->is_own)
            s->own_used[task->direction] = false;
    }
    if (task->is_command)
        vx_service_command_ends(s);
    /* Keep at most one spare buffer for each piece of the connection's own memory that is not in
     * use. */
    bool kept = s->spare_count + s->own_used[0] + s->own_used[1] < VX_SERVICE_SPARES;
    if (task->capacity == VX_SERVICE_PIECE && task->buffer != NULL && kept)
        s->spare[s->spare_count++] = task->buffer;
    else
        free(task->buffer);
    free(task);
}

bool vx_service_is_in_the_way(const vx_service *s, uint64_t moved_ns)
{
    uint64_t now = vx_now_ns(), since = vx_pool_shortage_since(s->pool, now);
    return s->borrowed > 0 && since != 0 && now - since > VX_SERVICE_STALL_NS &&
           now - moved_ns > VX_SERVICE_STALL_NS;
}

/* ---- requests ---- */

void vx_service_prepare(const vx_service *s, vx_request *request, uint32_t operation,
                        uint32_t flags, uint64_t offset, uint64_t length)
{
    memset(request, 0, offsetof(vx_request, failure));
    request->operation = operation;
    request->flags = flags;
    request->offset = offset;
    request->length = length;
    request->epoch_slot = s->initiator->epoch_slot;
    request->initiator = s->initiator;
}

bool vx_service_is_metered(const vx_service *s)
{
    return vx_meter_is_on(s->meter);
}

void vx_service_note(vx_service *s, uint32_t operation, uint64_t length, uint64_t began_ns,
                     uint64_t queued_ns)
{
    if (vx_meter_is_on(s->meter))
        vx_meter_note(s->meter, operation, length, vx_now_ns() - began_ns, queued_ns);
}

bool vx_service_try_request(vx_service *s, vx_request *request)
{
    uint64_t began = vx_meter_is_on(s->meter) ? vx_now_ns() : 0;
    request->flags |= VX_NOWAIT;
    if (vx_submit(s->device, request) != VX_DONE || request->not_before_ns != 0)
        return false;
    if (began != 0)
        vx_service_note(s, request->operation, request->length, began, 0);
    return true;
}

bool vx_service_try(vx_task *task)
{
    task->request.flags |= VX_NOWAIT;
    if (vx_submit(task->service->device, &task->request) == VX_DONE && task->request.not_before_ns == 0)
        return true;
    vx_request_again(&task->request, 0);
    return false;
}

static void hand_back(vx_task *task)
{
    vx_service *s = task->service;
    pthread_mutex_lock(&s->lock);
    task->next = s->completed;
    s->completed = task;
    signal_locked(s);
    pthread_mutex_unlock(&s->lock);
}

static void on_time(vx_job *job)
{
    vx_task *task = (vx_task *)job;
    vx_service *s = task->service;
    pthread_mutex_lock(&s->lock);
    *task->later_link = task->later;
    if (task->later != NULL)
        task->later->later_link = task->later_link;
    pthread_mutex_unlock(&s->lock);
    hand_back(task);
}

/* Holds the answer until not_before_ns if a device has set that. */
static void completed(vx_request *request)
{
    vx_task *task = request->context;
    vx_service *s = task->service;
    bool waits = false;
    if (request->not_before_ns > vx_now_ns()) {
        pthread_mutex_lock(&s->lock);
        waits = !s->dropped;
        if (waits) {
            task->later = s->later;
            task->later_link = &s->later;
            if (task->later != NULL)
                task->later->later_link = &task->later;
            s->later = task;
            task->job.run = on_time;
            vx_pool_push_at(s->pool, &task->job, request->not_before_ns);
        }
        pthread_mutex_unlock(&s->lock);
    }
    if (!waits)
        hand_back(task);
}

static void run_task(vx_job *job)
{
    vx_task *task = (vx_task *)job;
    task->request.complete = completed;
    task->request.context = task;
    if (vx_run(task->service->device, &task->request) == VX_DONE)
        completed(&task->request);
}

/* Submits the task on this thread, so that a throttle, or a map that is asked to flush, can park it
 * without the pool. False: the task still has to run. */
static bool park(vx_task *task)
{
    uint64_t done = task->request.done;
    task->request.complete = completed;
    task->request.context = task;
    task->request.flags |= VX_NOWAIT | VX_MAY_PARK;
    int answer = vx_submit(task->service->device, &task->request);
    if (answer == VX_PARKED)
        return true;
    if (answer == VX_DONE) {
        completed(&task->request);
        return true;
    }
    vx_request_again(&task->request, done);
    return false;
}

void vx_service_submit(vx_task *task)
{
    vx_service *s = task->service;
    if ((vx_service_is_paced(s) || task->request.operation == VX_FLUSH) && park(task))
        return;
    count(&s->pooled, counted(&s->pooled) + 1);
    task->job.run = run_task;
    vx_pool_push(s->pool, &task->job);
}

/* ---- completions ---- */

vx_task *vx_service_take_completed(vx_service *s)
{
    uint64_t ignored;
    pthread_mutex_lock(&s->lock);
    vx_task *newest = s->completed, *oldest_first = NULL;
    s->completed = NULL;
    while (s->signalled && read(s->wake, &ignored, sizeof ignored) < 0 && errno == EINTR)
        ;
    s->signalled = false;
    pthread_mutex_unlock(&s->lock);
    while (newest != NULL) {
        vx_task *next = newest->next;
        newest->next = oldest_first;
        oldest_first = newest;
        newest = next;
    }
    return oldest_first;
}

void vx_service_put_back(vx_service *s, vx_task *oldest_first)
{
    pthread_mutex_lock(&s->lock);
    while (oldest_first != NULL) {
        vx_task *next = oldest_first->next;
        oldest_first->next = s->completed;
        s->completed = oldest_first;
        oldest_first = next;
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- the end ---- */

void vx_service_drain(vx_service *s, bool drop)
{
    if (s->drained || !vx_service_is_paced(s))
        return;
    s->drained = true;
    s->device->operations->drain(s->device, drop);
}

void vx_service_drop(vx_service *s)
{
    vx_service_drain(s, true);
    pthread_mutex_lock(&s->lock);
    bool first = !s->dropped;
    s->dropped = true;
    for (vx_task *task = s->later; task != NULL && first; task = task->later)
        vx_pool_hasten(s->pool, &task->job);
    pthread_mutex_unlock(&s->lock);
    if (first && s->device->operations->drop != NULL)
        s->device->operations->drop(s->device, s->initiator);
}
