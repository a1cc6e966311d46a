/* SPDX-License-Identifier: MIT */
#include "map/switch.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/epoch.h"
#include "core/run.h"

typedef struct vx_switch {
    vx_device device;
    vx_epochs epochs;
    vx_pool *pool;
    _Atomic(vx_device *) lower; /* changed while paused only */
    _Atomic bool paused;
    pthread_mutex_t lock;
    vx_request *head, *tail; /* under lock: parked here */
    vx_job resume_job;
    bool running; /* under lock: resume_job is queued or runs */
    pthread_cond_t idle;
} vx_switch;

/* Parks the request. False if the switch was resumed meanwhile. */
static bool park(vx_switch *s, vx_request *request)
{
    pthread_mutex_lock(&s->lock);
    bool parked = atomic_load(&s->paused);
    if (parked) {
        request->next = NULL;
        if (s->tail != NULL)
            s->tail->next = request;
        else
            s->head = request;
        s->tail = request;
    }
    pthread_mutex_unlock(&s->lock);
    return parked;
}

static int switch_submit(vx_device *device, vx_request *request)
{
    vx_switch *s = (vx_switch *)device;
    for (;;) {
        uint32_t slot = vx_epoch_enter(&s->epochs, request->epoch_slot);
        if (!atomic_load(&s->paused)) {
            int answer = vx_submit(atomic_load(&s->lower), request);
            vx_epoch_leave(&s->epochs, slot);
            return answer;
        }
        vx_epoch_leave(&s->epochs, slot);
        if (request->flags & VX_NOWAIT)
            return VX_AGAIN;
        if (park(s, request))
            return VX_PARKED;
    }
}

/* Submits the parked requests again. Stops if the switch is paused; the rest stay parked. */
static void go_on(vx_job *job)
{
    vx_switch *s = (vx_switch *)((char *)job - offsetof(vx_switch, resume_job));
    pthread_mutex_lock(&s->lock);
    while (s->head != NULL && !atomic_load(&s->paused)) {
        vx_request *request = s->head;
        s->head = request->next;
        if (s->head == NULL)
            s->tail = NULL;
        pthread_mutex_unlock(&s->lock);
        request->next = NULL;
        request->memo = NULL; /* it was on the submitter's stack */
        if (vx_run(&s->device, request) == VX_DONE)
            request->complete(request);
        pthread_mutex_lock(&s->lock);
    }
    s->running = false;
    pthread_cond_broadcast(&s->idle);
    pthread_mutex_unlock(&s->lock);
}

void vx_switch_pause(vx_device *device)
{
    vx_switch *s = (vx_switch *)device;
    /* Do not wait for go_on: a request that it runs may wait for a lock that the caller holds. */
    pthread_mutex_lock(&s->lock);
    atomic_store(&s->paused, true);
    pthread_mutex_unlock(&s->lock);
    vx_epoch_quiesce(&s->epochs);
}

void vx_switch_set(vx_device *device, vx_device *lower)
{
    vx_switch *s = (vx_switch *)device;
    vx_device *old = atomic_exchange(&s->lower, vx_device_reference(lower));
    vx_device_release(old);
    vx_switch_follow(device);
}

void vx_switch_follow(vx_device *device)
{
    vx_switch *s = (vx_switch *)device;
    atomic_store(&device->size, vx_device_size(atomic_load(&s->lower)));
}

void vx_switch_resume(vx_device *device)
{
    vx_switch *s = (vx_switch *)device;
    pthread_mutex_lock(&s->lock);
    atomic_store(&s->paused, false);
    if (s->head != NULL && !s->running) {
        s->running = true;
        vx_pool_push(s->pool, &s->resume_job);
    }
    pthread_mutex_unlock(&s->lock);
}

static void switch_destroy(vx_device *device)
{
    vx_switch *s = (vx_switch *)device;
    pthread_mutex_lock(&s->lock);
    while (s->running)
        pthread_cond_wait(&s->idle, &s->lock);
    pthread_mutex_unlock(&s->lock);
    vx_device_release(atomic_load(&s->lower));
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->idle);
    free(s);
}

static const vx_operations switch_operations = {
    .kind = "switch", .forwards = true, .submit = switch_submit, .destroy = switch_destroy};

vx_device *vx_switch_create(vx_device *lower, vx_pool *pool, uint64_t identity)
{
    vx_switch *s = aligned_alloc(64, (sizeof *s + 63) / 64 * 64);
    if (s == NULL)
        return NULL;
    memset(s, 0, sizeof *s);
    vx_device_initialise(&s->device, &switch_operations, identity, NULL, vx_device_size(lower));
    s->device.read_only = lower->read_only;
    vx_epoch_initialise(&s->epochs);
    s->pool = pool;
    atomic_init(&s->lower, vx_device_reference(lower));
    s->resume_job.run = go_on;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->idle, NULL);
    return &s->device;
}
