// Arguments and faults of mutants.cu, for its kernels and for the driver.
#pragma once
#include <cstdint>

namespace mutants {

struct Args {
  const float *x, *w, *h_0;  // [T, B, H], [H, H], [B, H]
  float* y;                  // [T, B, H]
  uint64_t* words;
  void* payload;             // [2, B, H] bf16
  int T, B, H, U;            // U units a block
  int groups;                // independent recurrences, or blocks
  int extra_blocks;          // that own no unit
  uint32_t epoch;            // of the launch's first step; steps count up over launches
  int fault;
};

int launch_words(const Args& a);
int launch_flags(const Args& a);
int launch_cluster(const Args& a);
int launch_operations(const Args& a);
int launch_tile(const Args& a);
int launch_waits(const Args& a);

// tests/cuda/test_hostbuild.py reads the names from here
enum Fault {
  kClean,
  // words
  kNoBarrierAfterLoad,
  kOneSharedBuffer,
  kWrongParity,
  kOneExchangeBuffer,
  kNoFlagWait,
  kTwoWords,
  kOneTagForPair,
  kMisalignedPair,
  kWritePastEnd,
  kNoTailGuard,
  kDivergentShuffle,
  kDivergentBarrier,
  // flags
  kRelaxedLoad,
  kRelaxedStore,
  kNoBarrierBeforeRelease,
  kNoBarrierAfterAcquire,
  kOnePayloadBuffer,
  kPaddingNotCleared,
  kHalvesSwapped,
  kRowsSwapped,
  // cluster
  kWrongPhase,
  kCountTooLarge,
  kCountTooSmall,
  kPushOnLastStep,
  kBlockBarrierAfterInit,
  kNoInitFence,
  kOneClusterBuffer,
  kNoPushWait,
  kNoSyncBeforePush,
  kIdleWarpUnheld,
  kPushTwice,
  // operations
  kWrongMask,
  kSourceOutsideMask,
  kEndedLane,
  // tile
  kNoTileBarrier,
  kNoCopyWait,
  kCopyBarrierBeforeWait,
  kMisalignedCopy,
  kMisalignedVector,
  kStructCopyPastEnd,
  kWriteInput,
  kNeighbourBlock,
  kRegisterOverrun,
  kNullPointer,
  kDeepStack,
  kHostPointer,
  // waits
  kPlainSpin,
  kPlainSpinForever,
  kEndlessLoop,
  kPlainStore,
  kSpinWithoutPause,
  kHiddenWait,
};

}  // namespace mutants
