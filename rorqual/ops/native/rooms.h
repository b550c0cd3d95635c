/* Room that a call works in, kept for the next call: memory fresh from the system costs a fault for every page of it. */

#ifndef RORQUAL_ROOMS_H
#define RORQUAL_ROOMS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#define KEPT_ROOMS 4 /* at most, of all threads together */
#define LEAST_KEPT (64L << 10) /* bytes; smaller ones malloc has at hand */
#define MOST_KEPT (32L << 20)

typedef struct {
    size_t size;
    char line[64 - sizeof(size_t)]; /* what follows begins with a line of cache */
} Room;

static _Atomic(Room *) kept_rooms[KEPT_ROOMS];

/* Room for `size` bytes, which hold anything; to be given back. */
static void *take_room(size_t size) {
    for (int i = 0; i < KEPT_ROOMS && size >= LEAST_KEPT; i++) {
        Room *room = atomic_exchange(&kept_rooms[i], NULL);
        if (room && room->size >= size) return room + 1;
        free(room); /* too small: what is given back in the end takes its place, so that all of them come to fit */
    }
    size_t all = (sizeof(Room) + size + 63) / 64 * 64;
    Room *room = aligned_alloc(64, all);
    room->size = all - sizeof(Room);
    return room + 1;
}

/* Back; it is kept where a place is free. */
static void give_room(void *place) {
    Room *room = (Room *)place - 1;
    for (int i = 0; i < KEPT_ROOMS && room->size >= LEAST_KEPT && room->size <= MOST_KEPT; i++) {
        Room *none = NULL;
        if (atomic_compare_exchange_strong(&kept_rooms[i], &none, room)) return;
    }
    free(room);
}

#endif
