// SPDX-License-Identifier: Apache-2.0
// See staging.h.
#include "src/conformance/staging.h"

namespace msa::conformance {
namespace {

std::size_t bytes_of(const ConstTensorView& view) {
  return static_cast<std::size_t>(view.elements()) * dtype_size(view.dtype);
}

}  // namespace

DeviceBuffer& Staging::poisoned(std::size_t bytes) {
  DeviceBuffer& buffer = buffers_.emplace_back(bytes);
  buffer.upload(std::vector<std::byte>(bytes, std::byte{0xff}).data(), bytes);
  return buffer;
}

ConstTensorView Staging::input(const ConstTensorView& host) {
  if (!is_device()) return host;
  const std::size_t bytes = bytes_of(host);
  ConstTensorView device = host;
  DeviceBuffer& buffer = buffers_.emplace_back(bytes);
  buffer.upload(host.data, bytes);
  device.data = static_cast<const std::byte*>(buffer.data());
  return device;
}

std::span<const std::int32_t> Staging::input(std::span<const std::int32_t> host) {
  if (!is_device() || host.empty()) return host;
  const ConstTensorView device = input(make_view(host.data(), {static_cast<std::int64_t>(host.size())}));
  return {reinterpret_cast<const std::int32_t*>(device.data), host.size()};
}

Batch Staging::input(const Batch& host) {
  Batch device = host;
  device.cu_seqlens_q = input(host.cu_seqlens_q);
  device.cu_seqlens_k = input(host.cu_seqlens_k);
  device.page_table = input(host.page_table);
  device.seqlens_k = input(host.seqlens_k);
  device.query_positions = input(host.query_positions);
  return device;
}

TensorView Staging::output(const TensorView& host) {
  if (!is_device()) return host;
  TensorView device = host;
  device.data = static_cast<std::byte*>(poisoned(bytes_of(host)).data());
  outputs_.emplace_back(buffers_.size() - 1, host);
  return device;
}

void Staging::fetch() const {
  for (const auto& [number, host] : outputs_) buffers_[number].download(host.data, bytes_of(host));
}

Context Staging::with_workspace(std::size_t bytes) {
  Context context = context_;
  if (!is_device()) return context;
  context.workspace = poisoned(bytes).data();
  context.workspace_bytes = bytes;
  return context;
}

}  // namespace msa::conformance
