/* SPDX-License-Identifier: MIT */
#include "dmclock.h"

#include <stddef.h>

#include "bucket.h"

#define TICKS_PER_SECOND ((uint64_t)1000000000u * VX_TICKS_PER_NS)
#define SHARE_SCALE 1024u

typedef unsigned __int128 wide;

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t before(uint64_t now, uint64_t ns)
{
    return now > vx_ticks(ns) ? now - vx_ticks(ns) : 0;
}

static uint64_t ticks_of(uint64_t units, uint64_t rate)
{
    return (uint64_t)((wide)units * TICKS_PER_SECOND / rate);
}

/* Shares wrap: what is less than half of all numbers ahead is later. */
static bool is_behind(uint64_t a, uint64_t b)
{
    return (int64_t)(a - b) < 0;
}

bool vx_dmclock_is_waiting(const vx_dmclock_client *client)
{
    return client->link != NULL;
}

void vx_dmclock_set(const vx_dmclock *all, vx_dmclock_client *client, uint64_t reservation,
                    uint64_t limit, uint64_t weight, uint64_t now)
{
    client->reservation = reservation;
    client->limit = limit;
    client->weight = weight;
    client->reserved_at = client->limited_at = now;
    client->share = all->share;
}

void vx_dmclock_begin(vx_dmclock *all, vx_dmclock_client *client, uint64_t now)
{
    client->reserved_at = later(client->reserved_at, before(now, VX_DMCLOCK_IDLE_LAG_NS));
    client->limited_at = later(client->limited_at, now);
    if (is_behind(client->share, all->share))
        client->share = all->share;
    client->next = all->waiting;
    client->link = &all->waiting;
    if (client->next != NULL)
        client->next->link = &client->next;
    all->waiting = client;
}

void vx_dmclock_end(vx_dmclock_client *client)
{
    if (client->link == NULL)
        return;
    *client->link = client->next;
    if (client->next != NULL)
        client->next->link = client->link;
    client->link = NULL;
}

vx_dmclock_client *vx_dmclock_choose(const vx_dmclock *all, uint64_t now, bool *reserved,
                                     uint64_t *when)
{
    vx_dmclock_client *due = NULL, *fair = NULL;
    *when = UINT64_MAX;
    for (vx_dmclock_client *c = all->waiting; c != NULL; c = c->next) {
        if (c->reservation != 0) {
            if (c->reserved_at <= now && (due == NULL || c->reserved_at < due->reserved_at))
                due = c;
            if (c->reserved_at < *when)
                *when = c->reserved_at;
        }
        bool may = c->limit == 0 || c->limited_at <= now;
        if (may && (fair == NULL || is_behind(c->share, fair->share)))
            fair = c;
        if (c->limit != 0 && c->limited_at < *when)
            *when = c->limited_at;
    }
    *reserved = due != NULL;
    return due != NULL ? due : fair;
}

void vx_dmclock_serve(vx_dmclock *all, vx_dmclock_client *client, bool reserved, uint64_t units,
                      uint64_t cost, uint64_t now)
{
    if (reserved)
        client->reserved_at = later(client->reserved_at, before(now, VX_DMCLOCK_LAG_NS)) +
                              ticks_of(units, client->reservation);
    else
        all->share = client->share;
    if (client->limit != 0)
        client->limited_at = later(client->limited_at, before(now, VX_DMCLOCK_LAG_NS)) +
                             ticks_of(units, client->limit);
    client->share += cost * SHARE_SCALE / client->weight;
}
