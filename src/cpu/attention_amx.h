// SPDX-License-Identifier: Apache-2.0
// One visit of attention on AMX tiles: rows meet one block of keys and values, scores, softmax and weighted sums
// without leaving the near caches. All matrices lie tile by tile, 1 KiB each, as tile loads like them best; who lays
// them so is attention_amx-inl.h. Tested through the operators.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cpu/prefetch_queue.h"

namespace msa::cpu {

inline constexpr std::int64_t kTileElements = 512;  ///< bf16 elements of a tile: 16 rows of 32
inline constexpr std::int64_t kTileSums = 256;      ///< float elements of a tile: 16 rows of 16

/// Sixteen rows of a chunk.
struct AmxRows {
  const std::uint16_t* queries;  ///< [head_steps] tiles: element d of row r at [d / 32][r][d % 32]
  float* sums;                   ///< [value_tiles] tiles: element e of row r at [e / 16][r][e % 16]
  float* largest;  ///< [16], in and out: what exponents are relative to, a large score * scale; -inf at first
  float* totals;   ///< [16], in and out: running sums of e^(score * scale - largest)
  const std::int32_t* visible;  ///< [16] keys that each row sees; null: every row all of them, a multiple of 32
};

/// Tiles of rows a visit takes at most: few enough for their probabilities to stay in the L2 cache.
inline constexpr int kMaxRowTiles = 16;

/// Rows of few-headed groups that are copied into tiles together.
inline constexpr std::int64_t kStagedRows = 32;

struct AmxVisit {
  int row_tiles = 0;                       ///< 1 to kMaxRowTiles
  AmxRows rows[kMaxRowTiles];              ///< [row_tiles]
  const std::uint16_t* keys = nullptr;     ///< tiles [key_tiles][head_steps]: dims d, d + 1 of key j at [d / 2 % 16][j]
  const std::uint16_t* values = nullptr;   ///< tiles [value_tiles][key_steps]: keys j, j + 16 of 32 at [j][e]
  std::int64_t head_steps = 0;             ///< tiles of 32 dimensions
  std::int64_t key_tiles = 0;              ///< tiles of 16 keys
  std::int64_t value_tiles = 0;            ///< tiles of 16 dimensions
  float scale = 1;                         ///< of the scores; positive
  float* scores = nullptr;                 ///< scratch: round_up(key_tiles, 4) tiles of sums
  std::uint16_t* probabilities = nullptr;  ///< scratch: kMaxRowTiles * round_up(key_tiles, 2) / 2 tiles
  PrefetchQueue* ahead = nullptr;          ///< in and out: `ahead_lines` of them are asked for
  std::int64_t ahead_lines = 0;
};

/// Adds the block to the rows. What a row becomes depends on the row, the keys it sees and their order alone. Values
/// that a row does not see must be finite. The calling thread must hold AmxTiles.
void attend_amx(const AmxVisit& visit);

/// The two halves of attend_amx, for two threads or two times: the first reads queries and keys and writes
/// amx_score_floats, from which the second goes on. A row's largest and total do not depend on which of the value tiles
/// take part.
void score_amx(const AmxVisit& visit, float* scores);
void weigh_amx(const AmxVisit& visit, const float* scores);
inline std::int64_t amx_score_floats(int row_tiles, std::int64_t key_tiles) {
  return row_tiles * ((key_tiles + 1) / 2 * 2) * kTileSums;
}

}  // namespace msa::cpu
