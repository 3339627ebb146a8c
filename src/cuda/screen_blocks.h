// SPDX-License-Identifier: Apache-2.0
// Whether and how select_blocks screens blocks in int8 before it scores them exactly: when it is worth it, and what
// lies where in the workspace. Host arithmetic on shapes, like select_blocks.h. The kernels are in screen_blocks.cuh;
// docs/cuda-select-blocks.md proves the bound and counts what it leaves. Tested in tests/cuda/screen_blocks_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/screen_switch.h"

namespace msa::cuda {

struct SelectShape;
class WorkspaceLayout;

/// Rows a sequence must have on average: below, making int8 copies of the keys (384 bytes each, 0.09 ns) costs what
/// screening saves (256 flop a row and key at 790 TFLOP/s, of which 0.4: 0.13 ns for 1024 rows).
inline constexpr std::int64_t kScreenRows = 2048;
/// Blocks a slot that a sequence must be able to have: normal keys leave two blocks in doubt for each slot, and one in
/// doubt costs as much as four that are screened.
inline constexpr std::int64_t kScreenBlocksPerSlot = 16;
/// A chunk is screened when the last one left less than one in this many of its blocks in doubt.
inline constexpr std::int64_t kScreenLeastGain = 4;
/// Bytes of int8 copies beyond which nothing is screened; 8M keys of 128 dimensions.
inline constexpr std::int64_t kScreenMostKeyBytes = std::int64_t{1} << 30;
/// Row tiles that a work item of rescoring gathers from.
inline constexpr std::int64_t kRescoreTiles = 32;

struct ScreenPlan {
  bool use = false;
  bool always = false;         ///< also the chunks it does not help
  std::int64_t blocks = 0;     ///< numbers that blocks of the batch can have (first_block in batch.cuh), and two more
  std::int64_t row_words = 0;  ///< words of 32 rows that a chunk can have
  std::int64_t first_queries = 0;  ///< of the first chunk, which finds out whether screening helps
  std::int64_t doubt_bytes = 0;    ///< of both arrays of doubts, which lie side by side

  std::size_t keys = 0;            ///< Int8 [blocks, block_size, index_dim]
  std::size_t key_bounds = 0;      ///< KeyBound [blocks]
  std::size_t queries = 0;         ///< Int8 [chunk rows, index_dim]
  std::size_t row_bounds = 0;      ///< RowBound [chunk rows]
  std::size_t leaders = 0;         ///< int32 [chunk rows, topk]
  std::size_t doubts[2] = {0, 0};  ///< uint32 [key tiles, row_words] each
  std::size_t state = 0;           ///< ScreenState

  bool operator==(const ScreenPlan&) const = default;
};

/// The plan for chunks of `chunk_queries` queries of `many_rows` tiles; its parts are placed behind what `layout` has.
ScreenPlan plan_screening(const SelectShape& shape, bool many_rows, std::int64_t chunk_queries,
                          std::int64_t most_key_tiles, core::ScreenSwitch wanted, WorkspaceLayout& layout);

}  // namespace msa::cuda
