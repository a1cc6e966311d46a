/* SPDX-License-Identifier: MIT */
#include "core/run.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "core/delegate.h"
#include "core/pool.h"

static bool remember(vx_request *request, const vx_fault *fault)
{
    vx_memo *memo = request->memo;
    if (memo == NULL || memo->count == VX_MEMO_RANGES)
        return false;
    memo->ranges[memo->count].device = fault->device;
    memo->ranges[memo->count].first = fault->first;
    memo->ranges[memo->count].count = fault->count;
    memo->count++;
    return true;
}

static bool same_fault(const vx_fault *a, const vx_fault *b)
{
    return a->device == b->device && a->kind == b->kind && a->first == b->first &&
           a->disk == b->disk;
}

/* True when the request may be submitted again. */
static bool answer_fault(vx_request *request, vx_fault *last, uint64_t *last_progress)
{
    vx_fault fault = request->fault;
    vx_device *device = fault.device;
    fault.time = (vx_time){request->starts_ns, request->virtual_time};
    int code = device->upcalls == NULL || device->upcalls->fault == NULL
                   ? VX_E_UNSUPPORTED
                   : vx_upcall_fault(device, &fault);
    if (code == VX_E_UPCALL)
        vx_device_set_state(device, VX_E_POISONED);
    if (code == 0 && fault.kind == VX_FAULT_RANGE && !remember(request, &fault))
        code = VX_E_NO_PROGRESS;
    uint64_t progress = atomic_load(&device->progress);
    if (code == 0 && fault.kind != VX_FAULT_RANGE && same_fault(&fault, last) &&
        progress == *last_progress)
        code = VX_E_NO_PROGRESS;
    *last = fault;
    *last_progress = progress;
    if (fault.time.ns > request->starts_ns) {
        request->starts_ns = fault.time.ns;
        request->virtual_time |= fault.time.is_virtual;
    }
    if (code == 0)
        return true;
    vx_fail(device, request, code, 0, request->offset);
    return false;
}

int vx_run(vx_device *device, vx_request *request)
{
    vx_memo memo = {.count = 0};
    vx_fault last = {.device = NULL};
    uint64_t progress = 0;
    bool lend = request->memo == NULL;
    int answer;
    if (lend)
        request->memo = &memo;
    for (;;) {
        uint64_t done = request->done;
        answer = vx_submit(device, request);
        if (answer == VX_PARKED)
            return VX_PARKED; /* the request may already be complete and freed */
        if (request->done != done)
            request->memo->count = 0;
        if (answer == VX_AGAIN)
            sched_yield();
        else if (answer != VX_FAULTED || !answer_fault(request, &last, &progress))
            break;
    }
    if (lend)
        request->memo = NULL;
    if (last.device != NULL && request->starts_ns > request->not_before_ns)
        request->not_before_ns = request->starts_ns; /* answering its faults took until then */
    return answer == VX_FAULTED ? VX_DONE : answer;
}

typedef struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool finished;
} waiter;

static void finish_wait(vx_request *request)
{
    waiter *waiting = request->context;
    pthread_mutex_lock(&waiting->lock);
    waiting->finished = true;
    pthread_cond_signal(&waiting->changed);
    pthread_mutex_unlock(&waiting->lock);
}

static int drive(vx_device *device, vx_request *request, int (*submit)(vx_device *, vx_request *))
{
    waiter waiting = {.lock = PTHREAD_MUTEX_INITIALIZER,
                      .changed = PTHREAD_COND_INITIALIZER,
                      .finished = false};
    atomic_init(&request->waits_for, 0);
    request->complete = finish_wait;
    request->context = &waiting;
    int answer = submit(device, request);
    if (answer == VX_PARKED) {
        vx_pool_check_wait(request->waits_for);
        pthread_mutex_lock(&waiting.lock);
        while (!waiting.finished)
            pthread_cond_wait(&waiting.changed, &waiting.lock);
        pthread_mutex_unlock(&waiting.lock);
        answer = VX_DONE;
    }
    pthread_mutex_destroy(&waiting.lock);
    pthread_cond_destroy(&waiting.changed);
    return answer;
}

int vx_call_waiting(vx_device *device, vx_request *request)
{
    return drive(device, request, vx_submit);
}

int vx_finish(vx_device *device, vx_request *request)
{
    drive(device, request, vx_run);
    request->memo = NULL; /* it was on this thread's stack */
    return request->result;
}

int vx_wait(vx_device *device, vx_request *request)
{
    vx_finish(device, request);
    if (request->not_before_ns != 0 && !request->virtual_time) {
        struct timespec until = {.tv_sec = (time_t)(request->not_before_ns / 1000000000u),
                                 .tv_nsec = (long)(request->not_before_ns % 1000000000u)};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
            ;
    }
    return request->result;
}

static uint32_t slot_of_thread(void)
{
    uintptr_t self = (uintptr_t)pthread_self();
    return (uint32_t)((self >> 12) ^ (self >> 20));
}

/* Carries the request out, and hands up when it is done by a delay's clock, or sleeps until then. */
static int settle(vx_device *device, vx_request *request, vx_time *time)
{
    if (time == NULL)
        return vx_wait(device, request);
    vx_finish(device, request);
    if (request->not_before_ns > time->ns)
        time->ns = request->not_before_ns;
    time->is_virtual |= request->virtual_time;
    return request->result;
}

int vx_transfer(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                uint64_t length, uint64_t offset, vx_failure *failure)
{
    return vx_transfer_at(device, operation, flags, buffer, length, offset, NULL, failure);
}

int vx_transfer_at(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                   uint64_t length, uint64_t offset, vx_time *time, vx_failure *failure)
{
    vx_request request;
    memset(&request, 0, offsetof(vx_request, failure));
    request.operation = operation;
    request.flags = flags;
    request.buffer = buffer;
    request.length = length;
    request.offset = offset;
    request.epoch_slot = slot_of_thread();
    if (time != NULL) {
        request.starts_ns = time->ns;
        request.virtual_time = time->is_virtual;
    }
    if (!vx_is_inside(device, &request)) {
        *failure = request.failure;
        return request.result;
    }
    if (operation == VX_READ && length <= 65536) {
        /* Most reads hit the page cache: try first without a waiter. */
        request.flags = flags | VX_NOWAIT;
        if (vx_submit(device, &request) == VX_DONE && request.not_before_ns == 0) {
            if (request.result != 0)
                *failure = request.failure;
            return request.result;
        }
        vx_request_again(&request, 0);
        request.flags = flags;
    }
    if (settle(device, &request, time) != 0)
        *failure = request.failure;
    return request.result;
}

int vx_batch(vx_device *device, vx_step *steps, size_t count, vx_time *time, vx_failure *failure)
{
    for (size_t i = 0; i < count; i++) {
        int result = vx_transfer_at(device, steps[i].operation, 0, steps[i].buffer,
                                    steps[i].length, steps[i].offset, time, failure);
        if (result != 0)
            return result;
    }
    return VX_OK;
}

int64_t vx_list_extents(vx_device *device, uint64_t offset, uint64_t length, vx_extent *extents,
                        uint32_t capacity, vx_failure *failure)
{
    vx_request request;
    memset(&request, 0, offsetof(vx_request, failure));
    request.operation = VX_EXTENTS;
    request.offset = offset;
    request.length = length;
    request.extents = extents;
    request.extent_capacity = capacity;
    request.epoch_slot = slot_of_thread();
    if (vx_wait(device, &request) != 0) {
        *failure = request.failure;
        return request.result;
    }
    return request.extent_count;
}
