/* SPDX-License-Identifier: MIT */
#include "qos/dmclock.h"

#include <stddef.h>

#include "qos/bucket.h"

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

/* Shares wrap: `b` is ahead of `a` if b - a is less than half of the number range. */
static bool is_behind(uint64_t a, uint64_t b)
{
    return (int64_t)(a - b) < 0;
}

/* Converts a tag to another rate: as many units ahead of now as before; a past tag moves to now. */
static uint64_t retimed(uint64_t tag, uint64_t old_rate, uint64_t new_rate, uint64_t now)
{
    if (old_rate == new_rate)
        return tag;
    if (old_rate == 0 || new_rate == 0 || tag <= now)
        return now;
    wide ahead = (wide)(tag - now) * old_rate / new_rate;
    return now + (ahead > TICKS_PER_SECOND * 86400u ? TICKS_PER_SECOND * 86400u : (uint64_t)ahead);
}

void vx_dmclock_set(const vx_dmclock *all, vx_dmclock_client *client, uint64_t reservation,
                    uint64_t limit, uint64_t weight, uint64_t now)
{
    client->reserved_at = retimed(client->reserved_at, client->reservation, reservation, now);
    client->limited_at = retimed(client->limited_at, client->limit, limit, now);
    /* The units that the old reservation gave would otherwise count against its weight for long. */
    if (reservation != client->reservation)
        client->share = all->share;
    client->reservation = reservation;
    client->limit = limit;
    client->weight = weight;
}

void vx_dmclock_begin(vx_dmclock *all, vx_dmclock_client *client, uint64_t now)
{
    if (!client->active && client->reserved_at < now) {
        uint64_t idle = now > client->rested_at ? now - client->rested_at : 0;
        client->reserved_at = idle < now - client->reserved_at ? client->reserved_at + idle : now;
    }
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

static bool may_go(const vx_dmclock_client *client, uint64_t now)
{
    return client->limit == 0 || client->limited_at <= now;
}

/* The time by which its reservation must be served. */
static uint64_t deadline(const vx_dmclock_client *client)
{
    return client->reserved_at + ticks_of(client->units + (client->units == 0), client->reservation);
}

uint64_t vx_dmclock_late(const vx_dmclock_client *client, uint64_t now)
{
    if (client->reservation == 0 || !client->active || deadline(client) >= now)
        return 0;
    return now - deadline(client);
}

vx_dmclock_client *vx_dmclock_choose(const vx_dmclock *all, uint64_t now, bool *reserved,
                                     uint64_t *when)
{
    vx_dmclock_client *due = NULL, *fair = NULL;
    uint64_t first = UINT64_MAX;
    *when = UINT64_MAX;
    for (vx_dmclock_client *c = all->waiting; c != NULL; c = c->next) {
        if (c->reservation != 0) {
            uint64_t until = c->reserved_at <= now ? deadline(c) : UINT64_MAX;
            if (until < first) {
                first = until;
                due = c;
            }
            if (c->reserved_at < *when)
                *when = c->reserved_at;
        }
        if (may_go(c, now) && (fair == NULL || is_behind(c->share, fair->share)))
            fair = c;
        if (c->limit != 0 && c->limited_at < *when)
            *when = c->limited_at;
    }
    /* If the reservations exceed the capacity, no client may starve. */
    bool in_time = first > before(now, VX_DMCLOCK_OVERLOAD_NS);
    *reserved = due != NULL &&
                (fair == NULL || in_time || all->in_a_row < VX_DMCLOCK_RESERVED_IN_A_ROW);
    return *reserved ? due : fair;
}

/* Advances the share at which clients start to the least share of those that may be served. */
static void move_on(vx_dmclock *all, const vx_dmclock_client *served, uint64_t now)
{
    uint64_t least = served->share;
    for (const vx_dmclock_client *c = all->waiting; c != NULL; c = c->next)
        if (may_go(c, now) && is_behind(c->share, least))
            least = c->share;
    if (is_behind(all->share, least))
        all->share = least;
}

void vx_dmclock_serve(vx_dmclock *all, vx_dmclock_client *client, bool reserved, uint64_t units,
                      uint64_t cost, uint64_t now)
{
    all->in_a_row = reserved ? all->in_a_row + 1 : 0;
    if (client->reservation != 0) {
        uint64_t step = ticks_of(units, client->reservation);
        uint64_t owed = before(now, VX_DMCLOCK_LAG_NS);
        uint64_t tag = later(client->reserved_at, owed > step ? owed - step : 0);
        client->reserved_at = (tag < now ? tag : now) + step;
    }
    if (client->limit != 0)
        client->limited_at = later(client->limited_at, before(now, VX_DMCLOCK_LAG_NS)) +
                             ticks_of(units, client->limit);
    /* A client that its limit held back earns no credit for that time. */
    if (is_behind(client->share, all->share))
        client->share = all->share;
    client->share += cost * SHARE_SCALE / client->weight;
    move_on(all, client, now);
}
