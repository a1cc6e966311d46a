/* SPDX-License-Identifier: MIT */
#include "core/fan.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/run.h"

typedef struct child {
    vx_request request;
    vx_device *lower;
} child;

/* A job that helps. It may start after the fan has ended, and then finds nothing to take. */
typedef struct helper {
    vx_job job;
    vx_fan *fan;
} helper;

struct vx_fan {
    _Atomic uint32_t references; /* the caller and each helper that has not ended */
    _Atomic uint32_t taken;      /* children that a thread has taken, or more */
    uint32_t count, capacity;
    helper *helpers;
    pthread_mutex_t lock;
    pthread_cond_t all_ended;
    uint32_t ended; /* under lock */
    child children[];
};

vx_fan *vx_fan_begin(uint32_t capacity)
{
    vx_fan *fan = calloc(1, sizeof *fan + capacity * sizeof(child));
    if (fan == NULL)
        return NULL;
    atomic_init(&fan->references, 1);
    fan->capacity = capacity;
    pthread_mutex_init(&fan->lock, NULL);
    pthread_cond_init(&fan->all_ended, NULL);
    return fan;
}

vx_request *vx_fan_add(vx_fan *fan, const vx_request *parent, vx_device *lower, uint32_t operation,
                       uint64_t offset, uint64_t length, uint8_t *buffer)
{
    if (fan->count == fan->capacity)
        return NULL;
    child *added = &fan->children[fan->count++];
    vx_request_child(&added->request, parent, operation, offset, length, buffer);
    added->request.flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    added->request.memo = NULL;
    added->lower = vx_device_reference(lower);
    return &added->request;
}

static void take_children(vx_fan *fan)
{
    for (;;) {
        uint32_t index = atomic_fetch_add(&fan->taken, 1);
        if (index >= fan->count)
            return;
        vx_finish(fan->children[index].lower, &fan->children[index].request);
        pthread_mutex_lock(&fan->lock);
        if (++fan->ended == fan->count)
            pthread_cond_signal(&fan->all_ended);
        pthread_mutex_unlock(&fan->lock);
    }
}

static void release(vx_fan *fan)
{
    if (atomic_fetch_sub(&fan->references, 1) != 1)
        return;
    pthread_mutex_destroy(&fan->lock);
    pthread_cond_destroy(&fan->all_ended);
    free(fan->helpers);
    free(fan);
}

static void help(vx_job *job)
{
    vx_fan *fan = ((helper *)(void *)job)->fan;
    take_children(fan);
    release(fan);
}

void vx_fan_end(vx_fan *fan)
{
    for (uint32_t i = 0; i < fan->count; i++) /* helpers that come late find no child to take */
        vx_device_release(fan->children[i].lower);
    release(fan);
}

void vx_fan_run(vx_fan *fan, vx_pool *pool, uint32_t helpers)
{
    if (helpers >= fan->count)
        helpers = fan->count == 0 ? 0 : fan->count - 1;
    if (pool != NULL && helpers > 0)
        fan->helpers = calloc(helpers, sizeof *fan->helpers);
    for (uint32_t i = 0; fan->helpers != NULL && i < helpers; i++) {
        fan->helpers[i] = (helper){.job = {.run = help}, .fan = fan};
        atomic_fetch_add(&fan->references, 1);
        if (vx_pool_push_if_free(pool, &fan->helpers[i].job))
            continue;
        atomic_fetch_sub(&fan->references, 1); /* the caller has another one */
        break;
    }
    take_children(fan);
    pthread_mutex_lock(&fan->lock);
    while (fan->ended < fan->count)
        pthread_cond_wait(&fan->all_ended, &fan->lock);
    pthread_mutex_unlock(&fan->lock);
}

bool vx_fan_lacks_only_space(const vx_fan *fan)
{
    for (uint32_t i = 0; i < fan->count; i++) {
        int32_t result = fan->children[i].request.result;
        if (result != 0 &&
            (result != VX_E_NOSPACE || vx_device_state(fan->children[i].lower) != 0))
            return false;
    }
    return true;
}

void vx_fan_adopt(const vx_fan *fan, vx_request *parent)
{
    for (uint32_t i = fan->count; i-- > 0;) { /* the first failure is adopted last */
        const vx_request *request = &fan->children[i].request;
        int32_t result = parent->result;
        vx_request_adopt(parent, request);
        if (request->result == 0)
            parent->result = result;
    }
}

int vx_transfer_together(vx_pool *pool, uint32_t count, vx_device *const *devices,
                         uint32_t operation, uint8_t *buffer, uint64_t length,
                         const uint64_t *offsets, vx_time *time, vx_failure *failures)
{
    vx_request parent;
    memset(&parent, 0, sizeof parent);
    parent.starts_ns = time->ns;
    parent.virtual_time = time->is_virtual;
    vx_fan *fan = vx_fan_begin(count);
    if (fan == NULL)
        return VX_E_NOMEM;
    for (uint32_t i = 0; i < count; i++)
        vx_fan_add(fan, &parent, devices[i], operation, offsets[i], length, buffer);
    vx_fan_run(fan, pool, count);
    vx_fan_adopt(fan, &parent);
    for (uint32_t i = 0; i < count; i++)
        failures[i] = fan->children[i].request.result == 0 ? (vx_failure){0}
                                                           : fan->children[i].request.failure;
    if (parent.not_before_ns > time->ns)
        time->ns = parent.not_before_ns;
    time->is_virtual |= parent.virtual_time;
    vx_fan_end(fan);
    return VX_OK;
}
