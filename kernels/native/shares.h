/* Work items dealt to threads in contiguous shares, with stealing.
 *
 * On a machine of its own each thread walks its share, one stream through memory, as with a static
 * schedule; where another process takes a core away, the threads that still run finish the shares
 * of the one that doesn't, instead of waiting out its time slice.
 */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

struct share {
    _Alignas(64) atomic_int_fast64_t next; /* a cache line each: no false sharing */
    int64_t end;
};

static inline void deal_shares(struct share *shares, int64_t num_shares, int64_t num_items)
{
    for (int64_t i = 0; i < num_shares; i++) {
        atomic_init(&shares[i].next, num_items * i / num_shares);
        shares[i].end = num_items * (i + 1) / num_shares;
    }
}

/* The next item for the thread whose own share is `own`; -1 when all are taken. */
static inline int64_t take_item(struct share *shares, int64_t num_shares, int64_t own)
{
    for (int64_t i = 0; i < num_shares; i++) {
        struct share *share = &shares[(own + i) % num_shares];
        if (atomic_load_explicit(&share->next, memory_order_relaxed) >= share->end)
            continue;
        int64_t item = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed);
        if (item < share->end)
            return item;
    }
    return -1;
}
