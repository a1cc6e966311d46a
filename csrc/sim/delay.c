/* SPDX-License-Identifier: MIT */
#include "sim/delay.h"

#include <stdlib.h>

typedef struct delay {
    vx_device device;
    vx_device *lower;
    vx_model *model;
    vx_clock *clock;
    uint64_t base; /* bytes, on the model */
} delay;

/* A request in the lower device, which may park it. */
typedef struct passing {
    delay *delay;
    void (*complete)(vx_request *request);
    void *context;
    uint64_t arrived; /* ns */
} passing;

static void charge(delay *d, vx_request *request, uint64_t arrived)
{
    if (request->result != 0)
        return;
    uint64_t done = vx_model_serve(d->model, request->operation, d->base + request->offset,
                                   request->length, arrived);
    if (done > request->not_before_ns)
        request->not_before_ns = done;
    request->virtual_time |= vx_clock_is_virtual(d->clock);
}

static void completed(vx_request *request)
{
    passing *p = request->context;
    charge(p->delay, request, p->arrived);
    request->complete = p->complete;
    request->context = p->context;
    free(p);
    request->complete(request);
}

static int delay_submit(vx_device *device, vx_request *request)
{
    delay *d = (delay *)device;
    if (request->operation == VX_EXTENTS)
        return vx_submit(d->lower, request);
    if (request->flags & VX_NOWAIT && !(request->flags & VX_MAY_PARK))
        return VX_AGAIN;
    passing *p = malloc(sizeof *p);
    if (p == NULL)
        return vx_fail(device, request, VX_E_NOMEM, 0, request->offset);
    uint64_t now = vx_clock_now(d->clock);
    *p = (passing){d, request->complete, request->context,
                   request->starts_ns > now ? request->starts_ns : now};
    request->complete = completed;
    request->context = p;
    int answer = vx_submit(d->lower, request);
    if (answer == VX_PARKED)
        return VX_PARKED;
    if (answer == VX_DONE)
        charge(d, request, p->arrived);
    request->complete = p->complete;
    request->context = p->context;
    free(p);
    return answer;
}

static void delay_destroy(vx_device *device)
{
    delay *d = (delay *)device;
    vx_device_release(d->lower);
    free(d);
}

static const vx_operations delay_operations = {
    .kind = "delay", .forwards = true, .submit = delay_submit, .destroy = delay_destroy};

vx_device *vx_delay_create(vx_device *lower, vx_model *model, vx_clock *clock, uint64_t base,
                           uint64_t identity)
{
    delay *d = calloc(1, sizeof *d);
    if (d == NULL)
        return NULL;
    vx_device_initialise(&d->device, &delay_operations, identity, NULL, 0);
    d->device.sized_by = lower;
    d->lower = vx_device_reference(lower);
    d->model = model;
    d->clock = clock;
    d->base = base;
    return &d->device;
}
