/* SPDX-License-Identifier: MIT */
#include "sim/load.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/run.h"

#define DEEPEST 1024u
#define LONGEST ((uint64_t)32u << 20)
#define MOST_MEMORY ((uint64_t)256u << 20)

typedef struct sent {
    vx_request request;
    vx_job job;
    vx_timer timer;
    vx_load *load;
    uint64_t began;
    bool pauses;
} sent;

struct vx_load {
    vx_device *device;
    vx_clock *clock;
    vx_pool *pool;
    vx_meter *meter;
    vx_load_terms terms;
    bool is_virtual;
    pthread_mutex_t lock;
    pthread_cond_t idle;
    /* under the lock */
    bool running, orphaned;
    uint64_t random, next, answered, failed, under_way;
    uint8_t *buffer; /* `length` bytes for each request */
    sent *all;
};

static uint64_t random_number(vx_load *load)
{
    load->random ^= load->random << 13;
    load->random ^= load->random >> 7;
    load->random ^= load->random << 17;
    return load->random * UINT64_C(0x2545F4914F6CDD1D);
}

/* Under the lock. */
static void prepare(vx_load *load, sent *one)
{
    const vx_load_terms *terms = &load->terms;
    uint64_t length = terms->length, sizes = 1;
    if (terms->least != 0)
        while (terms->length >> sizes >= terms->least)
            sizes++;
    if (sizes > 1)
        length >>= random_number(load) % sizes;
    uint64_t places = terms->span / length;
    uint64_t place = terms->in_a_row ? load->next++ % places : random_number(load) % places;
    bool writes = random_number(load) % 100 < terms->write_percent;
    memset(&one->request, 0, offsetof(vx_request, failure));
    one->request.operation = writes ? VX_WRITE : VX_READ;
    one->request.offset = terms->first + place * length;
    one->request.length = length;
    one->request.buffer = load->buffer + (size_t)(one - load->all) * terms->length;
    one->request.context = one;
    one->began = vx_clock_now(load->clock);
    if (vx_meter_is_on(load->meter))
        vx_meter_offer(load->meter, one->request.operation, length);
}

static void prepare_flush(vx_load *load, sent *one)
{
    memset(&one->request, 0, offsetof(vx_request, failure));
    one->request.operation = VX_FLUSH;
    one->request.context = one;
    one->began = vx_clock_now(load->clock);
}

static void free_load(vx_load *load)
{
    if (load->device != NULL)
        vx_device_release(load->device);
    pthread_mutex_destroy(&load->lock);
    pthread_cond_destroy(&load->idle);
    free(load->buffer);
    free(load->all);
    free(load);
}

static void send(sent *one);

/* Counts an answered request and prepares the next; returns whether there is one. */
static bool count(vx_load *load, sent *one)
{
    pthread_mutex_lock(&load->lock);
    bool flush = load->terms.flushes && one->request.operation == VX_WRITE &&
                 one->request.result == 0;
    load->answered += one->request.operation != VX_FLUSH;
    load->failed += one->request.result != 0;
    if (vx_meter_is_on(load->meter))
        vx_meter_note(load->meter, one->request.operation, one->request.length,
                      vx_clock_now(load->clock) - one->began, one->request.queued_ns);
    bool more = load->running, last = false;
    if (more && flush) {
        prepare_flush(load, one);
    } else if (more) {
        prepare(load, one);
    } else if (--load->under_way == 0) {
        last = load->orphaned;
        pthread_cond_broadcast(&load->idle);
    }
    pthread_mutex_unlock(&load->lock);
    if (last)
        free_load(load);
    return more;
}

static void answered(sent *one)
{
    vx_load *load = one->load;
    if (!count(load, one))
        return;
    one->pauses = load->terms.pause_ns != 0;
    if (!one->pauses ||
        !vx_clock_set(load->clock, &one->timer, vx_clock_now(load->clock) + load->terms.pause_ns))
        send(one);
}

static void on_time(vx_timer *timer)
{
    sent *one = (sent *)((char *)timer - offsetof(sent, timer));
    if (one->pauses) {
        one->pauses = false;
        one->began = vx_clock_now(one->load->clock);
        send(one);
    } else {
        answered(one);
    }
}

static void completed(vx_request *request)
{
    sent *one = request->context;
    vx_clock *clock = one->load->clock;
    if (request->not_before_ns <= vx_clock_now(clock) ||
        !vx_clock_set(clock, &one->timer, request->not_before_ns))
        answered(one);
}

static void run_sent(vx_job *job)
{
    sent *one = (sent *)((char *)job - offsetof(sent, job));
    if (vx_run(one->load->device, &one->request) == VX_DONE)
        completed(&one->request);
}

static void run_answered(vx_job *job)
{
    answered((sent *)((char *)job - offsetof(sent, job)));
}

static void send(sent *one)
{
    vx_load *load = one->load;
    one->request.complete = completed;
    one->request.flags = VX_NOWAIT | VX_MAY_PARK;
    int answer = vx_submit(load->device, &one->request);
    if (answer == VX_PARKED)
        return;
    bool done = answer == VX_DONE;
    if (done && (load->is_virtual || one->request.not_before_ns != 0)) {
        completed(&one->request);
        return;
    }
    if (!done)
        vx_request_again(&one->request, 0);
    one->job.run = done ? run_answered : run_sent; /* on the pool: a call from here would recurse */
    if (load->is_virtual)
        run_sent(&one->job);
    else
        vx_pool_push(load->pool, &one->job);
}

void vx_load_start(vx_load *load)
{
    pthread_mutex_lock(&load->lock);
    bool begins = !load->running && load->under_way == 0;
    load->running = true;
    if (begins) {
        load->under_way = load->terms.depth;
        for (uint32_t i = 0; i < load->terms.depth; i++)
            prepare(load, &load->all[i]);
    }
    pthread_mutex_unlock(&load->lock);
    for (uint32_t i = 0; begins && i < load->terms.depth; i++)
        send(&load->all[i]);
}

void vx_load_stop(vx_load *load)
{
    pthread_mutex_lock(&load->lock);
    load->running = false;
    while (!load->is_virtual && load->under_way > 0)
        pthread_cond_wait(&load->idle, &load->lock);
    pthread_mutex_unlock(&load->lock);
}

void vx_load_read(vx_load *load, vx_load_facts *facts)
{
    pthread_mutex_lock(&load->lock);
    facts->answered = load->answered;
    facts->failed = load->failed;
    facts->under_way = load->under_way;
    pthread_mutex_unlock(&load->lock);
}

void vx_load_destroy(vx_load *load)
{
    pthread_mutex_lock(&load->lock);
    load->running = false;
    load->orphaned = load->under_way > 0;
    load->meter = NULL;
    bool now = !load->orphaned;
    pthread_mutex_unlock(&load->lock);
    if (now)
        free_load(load);
}

vx_load *vx_load_create(vx_device *device, vx_clock *clock, vx_pool *pool, vx_meter *meter,
                        const vx_load_terms *terms)
{
    if (terms->length == 0 || terms->length > LONGEST || terms->span < terms->length ||
        terms->depth == 0 || terms->depth > DEEPEST || terms->write_percent > 100 ||
        terms->length * terms->depth > MOST_MEMORY)
        return NULL;
    vx_load *load = calloc(1, sizeof *load);
    if (load == NULL)
        return NULL;
    pthread_mutex_init(&load->lock, NULL);
    pthread_cond_init(&load->idle, NULL);
    load->terms = *terms;
    load->clock = clock;
    load->pool = pool;
    load->meter = meter;
    load->is_virtual = vx_clock_is_virtual(clock);
    load->random = terms->seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    load->buffer = calloc(terms->depth, terms->length);
    load->all = calloc(terms->depth, sizeof *load->all);
    if (load->buffer == NULL || load->all == NULL) {
        free_load(load);
        return NULL;
    }
    load->device = vx_device_reference(device);
    for (uint32_t i = 0; i < terms->depth; i++) {
        load->all[i].load = load;
        load->all[i].timer.run = on_time;
    }
    return load;
}
