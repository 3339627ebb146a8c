// SPDX-License-Identifier: Apache-2.0
// Shapes of the buffers that tile-inl.h works on; apart, because plans are made without vector code.
#pragma once

#include <cstdint>

namespace msa::cpu {

/// Columns a tile of `count` keys has: every width of the register tile divides a multiple of 16.
inline std::int64_t padded_columns(std::int64_t count) { return (count + 15) / 16 * 16; }

/// Row stride, in floats, for a buffer of `cols` columns that `product` reads as b: a row starts on a cache line and an
/// odd number of lines after the one above, so that the 16 columns of one register tile, all rows deep, spread over
/// every set of the L1 cache instead of piling up in a few (a stride of 128 floats would use 8 sets of 64).
inline std::int64_t padded_stride(std::int64_t cols) { return (padded_columns(cols) / 16 | 1) * 16; }

/// Rows of a score tile: 16 register tiles of 6 rows. With 128 keys 54 KiB, so that scores and the rows that made
/// them stay in the L2 cache while the strips of keys pass through L1.
inline constexpr std::int64_t kScoreRows = 96;

/// The same for bf16 products: two AMX tiles, four register tiles of 8 rows. 16 KiB of scores with 128 keys, which stay
/// in the L1 cache from the product through the softmax to the bf16 probabilities.
inline constexpr std::int64_t kBf16Rows = 32;

}  // namespace msa::cpu
