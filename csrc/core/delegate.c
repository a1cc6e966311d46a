/* SPDX-License-Identifier: MIT */
#include "core/delegate.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct call {
    const vx_device *device;
    vx_fault *fault;     /* or NULL */
    vx_request *request; /* or NULL */
    uint64_t size;       /* of a resize: both pointers are NULL */
    int code;
    bool done;
} call;

struct vx_delegate {
    pthread_t owner;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* handed, call.done, serving or ended */
    call *handed;           /* under lock */
    bool serving;           /* under lock: vx_delegate_serve runs */
    bool ended;             /* under lock */
};

vx_delegate *vx_delegate_create(uint64_t owner)
{
    vx_delegate *delegate = calloc(1, sizeof *delegate);
    if (delegate == NULL)
        return NULL;
    delegate->owner = (pthread_t)owner;
    pthread_mutex_init(&delegate->lock, NULL);
    pthread_cond_init(&delegate->changed, NULL);
    return delegate;
}

static int carry_out(const call *what)
{
    const vx_device *device = what->device;
    if (what->fault != NULL)
        return device->upcalls->fault(device->identity, what->fault);
    if (what->request != NULL)
        return device->upcalls->perform(device->identity, what->request);
    return device->upcalls->resize(device->identity, what->size);
}

void vx_delegate_serve(vx_delegate *delegate)
{
    pthread_mutex_lock(&delegate->lock);
    delegate->serving = true;
    pthread_cond_broadcast(&delegate->changed);
    while (!delegate->ended) {
        call *what = delegate->handed;
        if (what == NULL) {
            pthread_cond_wait(&delegate->changed, &delegate->lock);
            continue;
        }
        delegate->handed = NULL;
        pthread_mutex_unlock(&delegate->lock);
        int code = carry_out(what);
        pthread_mutex_lock(&delegate->lock);
        what->code = code;
        what->done = true;
        pthread_cond_broadcast(&delegate->changed);
    }
    delegate->serving = false;
    pthread_mutex_unlock(&delegate->lock);
}

void vx_delegate_end(vx_delegate *delegate)
{
    pthread_mutex_lock(&delegate->lock);
    delegate->ended = true;
    pthread_cond_broadcast(&delegate->changed);
    pthread_mutex_unlock(&delegate->lock);
}

static int hand_over(call *what)
{
    vx_delegate *delegate = what->device->upcalls->delegate;
    if (delegate == NULL || !pthread_equal(pthread_self(), delegate->owner))
        return carry_out(what);
    pthread_mutex_lock(&delegate->lock);
    while (!delegate->serving && !delegate->ended) /* the serving thread is starting */
        pthread_cond_wait(&delegate->changed, &delegate->lock);
    bool handed = !delegate->ended;
    if (handed) {
        delegate->handed = what;
        pthread_cond_broadcast(&delegate->changed);
        while (!what->done)
            pthread_cond_wait(&delegate->changed, &delegate->lock);
    }
    pthread_mutex_unlock(&delegate->lock);
    return handed ? what->code : carry_out(what);
}

int vx_upcall_fault(const vx_device *device, vx_fault *fault)
{
    return hand_over(&(call){.device = device, .fault = fault});
}

int vx_upcall_perform(const vx_device *device, vx_request *request)
{
    return hand_over(&(call){.device = device, .request = request});
}

int vx_upcall_resize(const vx_device *device, uint64_t size)
{
    return hand_over(&(call){.device = device, .size = size});
}
