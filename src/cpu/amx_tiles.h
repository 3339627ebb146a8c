// SPDX-License-Identifier: Apache-2.0
// AMX tile registers for the length of a scope: eight tiles of 16 rows x 64 bytes. What was configured before (by
// another library on the same thread) is put back. Only for code that runs when active_dot_products() is kAmx.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#define MSA_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl")))

namespace msa::cpu {

class AmxTiles {
 public:
  MSA_AMX_TARGET AmxTiles() {
    _tile_storeconfig(&before_);
    touch(&before_);
    Config config;
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = 16;
    }
    touch(&config);
    _tile_loadconfig(&config);
  }
  MSA_AMX_TARGET ~AmxTiles() {
    if (before_.palette != 0) {
      touch(&before_);
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  struct alignas(64) Config {  // the layout that ldtilecfg reads
    std::uint8_t palette = 0;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  // g++ 12 tells the compiler that the two instructions above touch 8 of the 64 bytes: the others must be in memory
  // anyway.
  static void touch(Config* config) { asm volatile("" : : "r"(config) : "memory"); }

  Config before_;
};

/// For the pauses between tile products, every 1,000 cycles or so: after 2,000 without any, the next product takes 850
/// cycles longer, and so does the next store of a tile (lab/attention/tile_sleep). Clears tiles 0, 2 and 4. The calling
/// thread must hold AmxTiles.
MSA_AMX_TARGET inline void keep_tiles_awake() {
  alignas(64) float nowhere[16 * 16];
  _tile_zero(0);
  _tile_zero(2);
  _tile_zero(4);
  _tile_dpbf16ps(0, 2, 4);
  _tile_stored(0, nowhere, 64);
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
