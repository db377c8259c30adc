// How the work of attention is shared out among threads, and the sizes of its blocks; for kernel sources only.
#pragma once

#include <cstdint>

namespace sharpcore::SHARPCORE_ISA {

using Index = std::int64_t;

// Most tiles of a task that are worked on together: they share what a block of the other operand costs to bring into
// the cache.
constexpr Index kTiles = 8;

// Rows of the other operand in a block, a multiple of every kTileRows: a tile of so many rows fits into the first-level
// cache beside the panels of small heads.
constexpr Index kBlock = 64;

// Scratch memory of a thread is at most about this, or what one tile and one tangent need: so it depends on the head
// size and not on how many rows or keys there are.
constexpr Index kScratchBytes = 512 * 1024;

// Tasks a thread should find, so that threads that start late or run slowly leave work to the others.
constexpr Index kTasksPerThread = 4;

// How the work is shared out: a task has some tiles of one head, a group, and some of the tangents, a split.
struct Shares {
    Index heads, groups, splits;
    Index tiles;       // of a group
    Index tangents;    // of a split, at most
    bool whole_heads;  // a task has all groups of its head

    Index tasks() const { return heads * (whole_heads ? 1 : groups) * splits; }
};

// `bytes(tiles, tangents)` is the scratch memory of a task. How tangents are split changes no result: each is computed
// by itself.
template <class Bytes>
Shares share_out(Index heads, Index tiles, Index count, int threads, Bytes bytes, bool whole_heads = false,
                 Index least_splits = 1) {
    Shares shares{heads, 1, least_splits, 1, 1, whole_heads};
    const auto update = [&] {
        shares.groups = (tiles + shares.tiles - 1) / shares.tiles;
        shares.tangents = (count + shares.splits - 1) / shares.splits;
    };
    const auto too_few = [&] { return threads > 1 && shares.tasks() < kTasksPerThread * threads; };
    for (update(); shares.splits < count && bytes(1, shares.tangents) > kScratchBytes; update()) ++shares.splits;
    while (shares.tiles < kTiles && shares.tiles < tiles && bytes(shares.tiles + 1, shares.tangents) <= kScratchBytes)
        ++shares.tiles;
    for (update(); too_few() && !whole_heads && shares.tiles > 1; update()) --shares.tiles;
    for (; too_few() && shares.splits < count; update()) ++shares.splits;
    shares.tiles = (tiles + shares.groups - 1) / shares.groups;
    return shares;
}

}  // namespace sharpcore::SHARPCORE_ISA
