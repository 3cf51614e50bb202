// How the blocks of the grid tier hand each other the results of a step, through L2. There are two ways; grid_tiles.h
// chooses by the bytes that a block reads in a step (kGridWordBytes). The third, pushes within a cluster, is in
// cluster.cuh.
//
// Words. A word of 64 bits holds one result (a float or two halves) and the tag of the step that made it. Readers look
// at the words themselves: one trip through L2, no fence, no flag and no second trip for the payload, but twice the
// bytes.
//
// Flags. Results stand alone. A warp that owns some stores its own and then, with release, the step's tag to a flag of
// its own. A warp that reads waits, with acquire, for the flags of those blocks whose units it multiplies; the results
// are then ordinary loads, all in flight at once. Three trips, but the bytes alone, and no look at any of them.
//
// Why it is safe. Tags count up within a launch, from 1, and a kernel before this one, in the stream's order, clears
// words and flags: whatever an earlier launch left, with any T, is gone, also when a captured graph is replayed with
// the same arguments, which an epoch kept by the host could not tell apart. Results of consecutive steps go to two
// buffers in turn. A block writes those of step n + 1 over those of step n - 1 only after its barrier of step n, when
// its warps between them have seen all of step n; each block made its own of step n after its barrier of step n - 1,
// when its warps had read all of n - 1. So a reader never finds a tag later than it waits for, and "`tag` or a later
// one" is `tag`. There is always one row running and one unit in every block, so nobody can be overtaken. With words,
// nothing else has to be ordered: each says for itself how old it is. With flags, that a buffer is read before it is
// written again is ordered by the same chain: reads, barrier, release of step n; acquire, barrier, writes.
#pragma once
#include "common.cuh"
#include "grid_tiles.h"

namespace fastrnn::cuda {

using tiles::GridShape;

FASTRNN_INLINE uint64_t tagged(uint32_t tag, uint32_t value) { return uint64_t(tag) << 32 | value; }

// What stands for units of K that are not: later than every step.
constexpr uint64_t kNoUnit = uint64_t(UINT32_MAX) << 32;

// Debug builds (-DFASTRNN_BOUNDED_SPINS=16777216, some 10 s) end the launch with an error instead of hanging, after so
// many turns of one wait. Not by going on with NaN: each of the many waits behind the first would run out too.
#if defined(FASTRNN_BOUNDED_SPINS)
constexpr int kMostTurns = FASTRNN_BOUNDED_SPINS;
#else
constexpr int kMostTurns = 0;  // no bound
#endif

FASTRNN_INLINE void pause(int& turn) {
  dev::spin_pause();
  if (kMostTurns && turn++ >= kMostTurns) dev::trap();
}

// The earliest of `tag` and the tags of two words.
FASTRNN_INLINE uint32_t earliest(uint32_t tag, const uint64_t (&word)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) tag = uint32_t(word[i] >> 32) < tag ? uint32_t(word[i] >> 32) : tag;
  return tag;
}

// Gives the pairs of words at(0), .. at(N - 1), of them the first `count`, once all of them carry `tag` or a later one.
// Orders no other memory. A turn is a load for each pair, a minimum for each word and one branch; at(n) should be a
// pointer made before and a constant.
// Loads that will miss cost as much as others on their way from L2. So where all are sure to be missing, `early`, a
// lane looks at one pair until it is there, and then at all of them.
template <int N, class At>
FASTRNN_INLINE void take(At at, int count, uint32_t tag, bool early, uint64_t (&word)[N][2]) {
  int turn = 0;
  if (early && count > 2)
    for (;; pause(turn)) {
      dev::load_relaxed(at(0), word[0]);
      if (earliest(tag, word[0]) == tag) break;
    }
  for (;; pause(turn)) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n < count) dev::load_relaxed(at(n), word[n]);
    uint32_t seen = tag;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n < count) seen = earliest(seen, word[n]);
    if (seen == tag) break;
  }
}

// The same of results that flags have told to be there.
template <int N, class At>
FASTRNN_INLINE void take(At at, int count, uint32_t, bool, uint32_t (&value)[N][2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < count) {
      const uint2 pair = *reinterpret_cast<const uint2*>(at(n));
      value[n][0] = pair.x, value[n][1] = pair.y;
    }
}

struct ByWords {
  using Word = uint64_t;
  static constexpr bool kPushes = false;
};
struct ByFlags {
  using Word = uint32_t;
  static constexpr bool kPushes = false;
};
struct ByPushes {
  using Word = uint32_t;
  static constexpr bool kPushes = true;
};

struct GridShared;

// The exchange of one group and tile of rows, as one thread of a block sees it. kGates, kTileWords: of K, and of a tile
// of it (GridShape).
template <class Way, int kGates, int kTileWords>
class Exchange {
  static constexpr bool kFlags = std::is_same<Way, ByFlags>::value;
  using Word = typename Way::Word;

 public:
  // word: where the thread's own result goes in a buffer (GridShape::word_of).
  FASTRNN_INLINE Exchange(void* workspace, const GridShape& s, const GridShared&, int word)
      : base(static_cast<Word*>(workspace)), odd(int(s.words())), own(word), own_flag(-1) {
    const int place = int(blockIdx.z) * s.row_tiles() + int(blockIdx.y), warp = int(threadIdx.x) / 32;
    even = place * 2 * odd;
    first_flag = int(s.all_words(int(gridDim.z))) + place * s.flags_of_tile();
    if (threadIdx.x % 32 == 0 && warp < s.owner_warps()) own_flag = int(blockIdx.x) * s.owner_warps() + warp;
  }

  // The buffer of step k. Steps may count up or down.
  FASTRNN_INLINE Word* words(int k) const { return base + (k & 1 ? even + odd : even); }

  // The thread's result of step k, for a gate of K.
  FASTRNN_INLINE void store(int k, uint32_t tag, int gate, uint32_t value) const {
    if constexpr (kFlags) words(k)[own + gate * kTileWords] = value;
    else dev::store_relaxed(words(k) + own + gate * kTileWords, tagged(tag, value));
  }
  // All threads of a warp, behind their last store of step k. No lane waits for others before its own warp's are out.
  // wanted: does anybody wait for them? The same in all blocks.
  FASTRNN_INLINE void publish(int, uint32_t tag, bool) const {
    dev::sync_warp();
    if constexpr (kFlags) {
      if (own_flag >= 0) dev::store_release(base + first_flag + own_flag, tag);
    }
  }
  // All threads of a warp, before they take words: waits until flags first .. first + count - 1 say `tag` or later. All
  // that their owners' warps stored before is then there for every lane. Words say for themselves what they are.
  FASTRNN_INLINE void await(int, uint32_t tag, int first, int count) const {
    if constexpr (kFlags) {
      int turn = 0;
      for (int i = int(threadIdx.x) % 32; i < count; i += 32)
        while (dev::load_acquire(base + first_flag + first + i) < tag) pause(turn);
      dev::sync_warp();
    }
  }

 private:
  Word* const base;
  const int odd, own;   // words from the buffer of even steps to that of odd ones; the thread's own in a buffer
  int even, first_flag, own_flag;  // flags are [blocks, warps that own results]; -1: none is this thread's to set
};

}  // namespace fastrnn::cuda
