// SPDX-License-Identifier: Apache-2.0
// See device_call.h.
#include "src/ops/device_call.h"

#include <algorithm>
#include <string>
#include <vector>

#include "src/cuda/operators.h"

namespace msa::ops {
namespace {

constexpr std::size_t kOwnBytes = kWorkspaceAlignment;  // the flag of the checks in front, the scalars from kScalars on
constexpr std::size_t kScalars = 64;

std::vector<std::int32_t> fetch(const Context& context, std::span<const std::int32_t> device) {
  std::vector<std::int32_t> host(device.size());
  if (!host.empty()) cuda::copy_to_host(context, host.data(), device.data(), device.size_bytes());
  return host;
}

/// Runs the host's checks on copies: they throw.
void report(const Validator& check, const Context& context, const DeviceContents& contents) {
  const std::vector<std::int32_t> cu_seqlens_q = fetch(context, contents.batch->cu_seqlens_q);
  const std::vector<std::int32_t> cu_seqlens_k = fetch(context, contents.batch->cu_seqlens_k);
  const std::vector<std::int32_t> page_table = fetch(context, contents.batch->page_table);
  const std::vector<std::int32_t> seqlens_k = fetch(context, contents.batch->seqlens_k);
  const std::vector<std::int32_t> positions = fetch(context, contents.batch->query_positions);
  Batch batch = *contents.batch;
  batch.cu_seqlens_q = cu_seqlens_q;
  batch.cu_seqlens_k = cu_seqlens_k;
  batch.page_table = page_table;
  batch.seqlens_k = seqlens_k;
  batch.query_positions = positions;
  // Inert rows have entries here, but not in the rule of the host.
  const auto real_rows = static_cast<std::size_t>(std::max(0, cu_seqlens_q.back()));
  if (real_rows < positions.size()) batch.query_positions = batch.query_positions.first(real_rows);
  check.check_batch_contents(batch, contents.query_rows, contents.keys_name, contents.keys);
  if (contents.blocks.empty() || contents.blocks.elements() == 0) return;
  std::int64_t elements = 1;
  for (int d = 0; d < contents.blocks.rank; ++d) {
    elements += (contents.blocks.size(d) - 1) * contents.blocks.stride(d);
  }
  const std::vector<std::int32_t> ids =
      fetch(context, {reinterpret_cast<const std::int32_t*>(contents.blocks.data), static_cast<std::size_t>(elements)});
  ConstTensorView blocks = contents.blocks;
  blocks.data = reinterpret_cast<const std::byte*>(ids.data());
  check.check_block_ids(blocks, batch, contents.block_size);
}

}  // namespace

std::size_t operator_limit(const Context& context) {
  if (context.workspace_limit == 0) return 0;
  return std::max(context.workspace_limit, kOwnBytes + 1) - kOwnBytes;
}

std::size_t device_bytes(const Validator& check, const Context& context, std::size_t needed) {
  const std::size_t bytes = kOwnBytes + needed;
  if (context.workspace_limit != 0 && bytes > context.workspace_limit) {
    check.fail("workspace_limit", "is " + std::to_string(context.workspace_limit) + " bytes; the call needs at least " +
                                      std::to_string(bytes) + " of device memory");
  }
  return bytes;
}

DeviceCall::DeviceCall(const Validator& check, const Context& context, std::size_t needed,
                       const DeviceContents& contents)
    : context_(context) {
  const std::size_t bytes = device_bytes(check, context, needed);
  if (context.workspace == nullptr || context.workspace_bytes < bytes) {
    check.fail("workspace", "has " + std::to_string(context.workspace == nullptr ? 0 : context.workspace_bytes) +
                                " bytes; the call needs " + std::to_string(bytes) + " of device memory");
  }
  if (reinterpret_cast<std::uintptr_t>(context.workspace) % kWorkspaceAlignment != 0) {
    check.fail("workspace", "must be aligned to " + std::to_string(kWorkspaceAlignment) + " bytes");
  }
  cuda::require_device();
  auto* const own = static_cast<std::byte*>(context.workspace);
  scalars_ = own + kScalars;
  context_.workspace = own + kOwnBytes;
  context_.workspace_bytes = context.workspace_bytes - kOwnBytes;
  if (const std::size_t limit = operator_limit(context); limit != 0) {
    context_.workspace_bytes = std::min(context_.workspace_bytes, limit);
  }
  if (contents.batch == nullptr || !context.check_device_data || cuda::is_capturing(context)) return;
  cuda::Contents device;
  device.batch = contents.batch;
  device.query_rows = contents.query_rows;
  device.key_rows = contents.keys.size(0);
  device.page = contents.batch->is_paged ? contents.keys.size(1) : 0;
  device.blocks = contents.blocks;
  device.block_size = contents.block_size;
  if (cuda::contents_hold(context, device, own)) return;
  report(check, context, contents);
  check.fail("batch", "its arrays in device memory broke a rule when checked and changed since");
}

}  // namespace msa::ops
