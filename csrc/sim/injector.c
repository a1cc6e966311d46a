/* SPDX-License-Identifier: MIT */
#include "sim/injector.h"

#include <pthread.h>
#include <stdlib.h>

#include "core/run.h"

typedef struct injector {
    vx_device device;
    vx_device *lower;
    vx_pool *pool;
    pthread_mutex_t lock;
    vx_injector_settings settings;
    uint64_t matched; /* requests that matched fail_mask so far */
} injector;

typedef struct parked {
    vx_job job;
    injector *self;
    vx_request *request;
} parked;

static int pass_on(injector *self, vx_request *request, uint64_t delay_ns,
                   int (*submit)(vx_device *, vx_request *))
{
    vx_request child;
    vx_request_child(&child, request, request->operation, request->offset, request->length,
                     request->buffer);
    child.extents = request->extents;
    child.extent_capacity = request->extent_capacity;
    int answer = submit(self->lower, &child);
    if (answer == VX_FAULTED)
        request->fault = child.fault;
    if (answer != VX_DONE)
        return answer;
    vx_request_adopt(request, &child);
    request->extent_count = child.extent_count;
    if (delay_ns != 0 && vx_now_ns() + delay_ns > request->not_before_ns)
        request->not_before_ns = vx_now_ns() + delay_ns;
    return VX_DONE;
}

static int run_to_end(vx_device *lower, vx_request *request)
{
    vx_wait(lower, request);
    return VX_DONE;
}

static void resume(vx_job *job)
{
    parked *waiting = (parked *)job;
    vx_request *request = waiting->request;
    request->memo = NULL; /* it belonged to the thread that parked the request */
    pass_on(waiting->self, request, 0, run_to_end);
    free(waiting);
    request->complete(request);
}

static int injector_submit(vx_device *device, vx_request *request)
{
    injector *self = (injector *)device;
    uint32_t bit = 1u << request->operation;
    pthread_mutex_lock(&self->lock);
    vx_injector_settings now = self->settings;
    bool again = (request->flags & VX_NOWAIT) &&
                 ((now.again_mask | now.park_mask | now.fail_mask) & bit);
    bool fail = !again && (now.fail_mask & bit) && self->matched++ >= now.fail_after;
    pthread_mutex_unlock(&self->lock);
    if (again)
        return VX_AGAIN;
    if (fail) {
        if (request->operation == VX_FLUSH)
            vx_device_set_state(device, VX_E_POISONED);
        return vx_fail(device, request, now.fail_code, 0, request->offset);
    }
    if (!(now.park_mask & bit))
        return pass_on(self, request, now.delay_mask & bit ? now.delay_ns : 0, vx_call);
    parked *waiting = malloc(sizeof *waiting);
    if (waiting == NULL)
        return vx_fail(device, request, VX_E_NOMEM, 0, request->offset);
    *waiting = (parked){.job = {.run = resume}, .self = self, .request = request};
    vx_pool_push_at(self->pool, &waiting->job, vx_now_ns() + now.park_ns);
    return VX_PARKED;
}

static int injector_resize(vx_device *device, uint64_t size)
{
    int code = vx_device_resize(((injector *)device)->lower, size);
    if (code == VX_OK)
        atomic_store(&device->size, size);
    return code;
}

static void injector_destroy(vx_device *device)
{
    injector *self = (injector *)device;
    vx_device_release(self->lower);
    pthread_mutex_destroy(&self->lock);
    free(self);
}

static const vx_operations injector_operations = {
    .kind = "injector", .submit = injector_submit, .resize = injector_resize, .destroy = injector_destroy};

vx_device *vx_injector_create(vx_device *lower, vx_pool *pool, uint64_t identity)
{
    injector *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    vx_device_initialise(&self->device, &injector_operations, identity, NULL, vx_device_size(lower));
    self->device.read_only = lower->read_only;
    self->lower = vx_device_reference(lower);
    self->pool = pool;
    pthread_mutex_init(&self->lock, NULL);
    return &self->device;
}

void vx_injector_set(vx_device *device, const vx_injector_settings *settings)
{
    injector *self = (injector *)device;
    pthread_mutex_lock(&self->lock);
    self->settings = *settings;
    self->matched = 0;
    pthread_mutex_unlock(&self->lock);
}
