// SPDX-License-Identifier: Apache-2.0
// The vector building blocks of src/cpu as plain functions, on the instruction set in use, so that each can be timed
// alone.
#pragma once

#include <cstdint>

namespace msa::bench {

/// out[i] = e^in[i], i < count; count a multiple of 16.
void run_exp(const float* in, std::int64_t count, float* out);

/// c[rows, cols] = a[rows, inner] * b[inner, cols]; cols a multiple of 16, b and c with the stride padded_stride(cols).
void run_product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* a, const float* b, float* c);

/// out[c * out_stride + r] = in[r * cols + c]
void run_transpose(const float* in, std::int64_t rows, std::int64_t cols, float* out, std::int64_t out_stride);

/// Softmax of a row in place, as the attention kernels do it: scaled, shifted by its maximum; returns the sum.
float run_softmax(float* row, std::int64_t count, float scale);

}  // namespace msa::bench
