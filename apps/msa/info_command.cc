// SPDX-License-Identifier: Apache-2.0
// `msa info`: what this build can do on this machine, and which path a shape takes. Tested in
// tests/integration/test_cli.py.
#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "apps/msa/commands.h"
#include "msa/error.h"
#include "msa/msa.h"

namespace msa::app {
namespace {

struct InfoOptions {
  bool json = false;
  std::int64_t query_heads = 64, kv_heads = 4, head_dim = 128, value_dim = 0, index_dim = 0, block_size = 128,
               topk = 16;
};

/// What the CUDA backend's fast kernels of an operator ask of a shape: the table of docs/cuda.md, to which
/// tests/integration/test_cli.py holds this one. Alignment is left out, since it is no part of a shape.
struct CudaKernels {
  const char* op;
  const char* dtypes;  ///< that they take, empty where there are none
  bool head_dim, value_dim, index_dim, block_size, group;
};
constexpr CudaKernels kCudaKernels[] = {
    {"select_blocks", "bfloat16, float16, index keys also float8_e4m3", false, false, true, true, false},
    {"topk_blocks", "float32 scores", false, false, false, false, false},
    {"sparse_attention", "bfloat16, float16", true, true, false, true, true},
    {"sparse_attention_backward", "bfloat16, float16", true, true, false, true, true},
    {"dense_attention", "bfloat16, float16, keys and values also float8_e4m3", true, true, false, false, true},
    {"dense_attention_backward", "bfloat16, float16", true, true, false, false, true},
    {"index_kl", "bfloat16, float16", true, false, true, true, true},
    {"index_kl_backward", "bfloat16, float16", true, false, true, true, true},
    {"select_blocks_oracle", "", false, false, false, false, false},
    {"selection_recall", "", false, false, false, false, false},
};
constexpr std::int64_t kMaxCudaGroup = 64;

/// Which kernels a contiguous call of this shape takes on a GPU, and why not the fast ones.
std::string cuda_path(const CudaKernels& kernels, const InfoOptions& o) {
  const auto is_wide = [](std::int64_t n) { return n == 64 || n == 128; };
  std::string why;
  if (*kernels.dtypes == '\0') why = "no others yet";
  if (kernels.group && o.query_heads / o.kv_heads > kMaxCudaGroup) {
    why = fmt::format("{} query heads a kv head are more than {}", o.query_heads / o.kv_heads, kMaxCudaGroup);
  }
  if (kernels.block_size && !is_wide(o.block_size)) why = fmt::format("block size {} is not 64 or 128", o.block_size);
  if (kernels.index_dim && !is_wide(o.index_dim)) why = fmt::format("index dim {} is not 64 or 128", o.index_dim);
  if (kernels.value_dim && o.value_dim != o.head_dim) {
    why = fmt::format("value dim {} is not head dim {}", o.value_dim, o.head_dim);
  }
  if (kernels.head_dim && !is_wide(o.head_dim)) why = fmt::format("head dim {} is not 64 or 128", o.head_dim);
  if (!why.empty()) return "cuda/plain (" + why + ")";
  return fmt::format("cuda/fast ({}; else plain)", kernels.dtypes);
}

/// One line.
std::string describe(const CudaInfo& cuda) {
  if (!cuda.built) return "not in this build (configure with -DMSA_CUDA=ON; docs/cuda.md)";
  if (!cuda.usable) return "built, not usable: " + cuda.why_not;
  return fmt::format("{}, {} multiprocessors, {:.0f} GiB", cuda.device, cuda.multiprocessors,
                     static_cast<double>(cuda.memory_bytes) / (1 << 30));
}

void check_multiple(const char* name, std::int64_t value) {
  if (value < kHeadDimMultiple || value > kMaxHeadDim || value % kHeadDimMultiple != 0) {
    throw Error(fmt::format("--{}: {} must be a multiple of {} from {} to {}", name, value, kHeadDimMultiple,
                            kHeadDimMultiple, kMaxHeadDim));
  }
}

void check_shape(const InfoOptions& o) {
  check_multiple("head-dim", o.head_dim);
  check_multiple("value-dim", o.value_dim);
  check_multiple("index-dim", o.index_dim);
  if (o.kv_heads < 1 || o.query_heads < 1 || o.query_heads % o.kv_heads != 0) {
    throw Error(
        fmt::format("--query-heads: {} must be a positive multiple of --kv-heads {}", o.query_heads, o.kv_heads));
  }
  const bool power_of_two = o.block_size > 0 && (o.block_size & (o.block_size - 1)) == 0;
  if (!power_of_two || o.block_size < kMinBlockSize || o.block_size > kMaxBlockSize) {
    throw Error(fmt::format("--block-size: {} must be a power of two from {} to {}", o.block_size, kMinBlockSize,
                            kMaxBlockSize));
  }
  if (o.topk < 1 || o.topk > kMaxTopk) throw Error(fmt::format("--topk: {} must be from 1 to {}", o.topk, kMaxTopk));
}

void print_info(InfoOptions o) {
  if (o.value_dim == 0) o.value_dim = o.head_dim;
  if (o.index_dim == 0) o.index_dim = o.head_dim;
  check_shape(o);
  const std::string active = active_instruction_set();
  nlohmann::ordered_json info;
  info["version"] = version();
  info["backends"]["cpu"] = {
      {"available", true}, {"instruction_sets", supported_instruction_sets()}, {"active_instruction_set", active}};
  info["backends"]["reference"] = {{"available", true}, {"arithmetic", "scalar float64"}};
  const CudaInfo cuda = cuda_info();
  info["backends"]["cuda"] = {{"built", cuda.built}, {"available", cuda.usable}};
  if (!cuda.usable) info["backends"]["cuda"]["why"] = cuda.why_not;
  if (!cuda.device.empty()) {
    info["backends"]["cuda"]["device"] = {{"name", cuda.device},
                                          {"compute_capability", cuda.compute_capability / 10.0},
                                          {"multiprocessors", cuda.multiprocessors},
                                          {"memory_bytes", cuda.memory_bytes}};
  }
  if (cuda.built) {
    info["backends"]["cuda"]["runtime"] = cuda.runtime_version;
    info["backends"]["cuda"]["driver"] = cuda.driver_version;
  }
  for (const CudaKernels& kernels : kCudaKernels) {  // what a build with CUDA takes, also where this is none
    info["backends"]["cuda"]["paths"][kernels.op] = cuda_path(kernels, o);
  }
  info["threads"] = std::thread::hardware_concurrency();
  info["dtypes"] = {"float32", "bfloat16", "float16"};
  info["cache_dtypes"] = {"float32", "bfloat16", "float16", "float8_e4m3"};
  info["limits"] = {{"block_size", {kMinBlockSize, kMaxBlockSize}},
                    {"topk", {1, kMaxTopk}},
                    {"head_dim", {kHeadDimMultiple, kMaxHeadDim}}};
  // Every geometry takes the same path; what differs is the arithmetic of products, by storage type and instruction
  // set.
  const std::string cpu_path = "cpu/" + active;
  info["shape"] = {{"query_heads", o.query_heads},
                   {"kv_heads", o.kv_heads},
                   {"head_dim", o.head_dim},
                   {"value_dim", o.value_dim},
                   {"index_dim", o.index_dim},
                   {"block_size", o.block_size},
                   {"topk", o.topk}};
  for (const char* op :
       {"select_blocks", "topk_blocks", "sparse_attention", "sparse_attention_backward", "dense_attention",
        "dense_attention_backward", "index_kl", "index_kl_backward", "selection_recall"}) {
    info["paths"][op] = cpu_path;
  }
  const bool has_amx = active == "amx";
  const bool has_bf16_dots = has_amx || active == "avx512_bf16";
  const bool has_int8_dots = has_bf16_dots || active == "avx512_vnni";
  info["products"] = {{"bfloat16", has_amx         ? "bf16, AMX tiles"
                                   : has_bf16_dots ? "bf16, vdpbf16ps"
                                                   : "float32"},
                      {"float32, float16", "float32"}};
  std::string screening = "off: this instruction set has no int8 dot products; MSA_SCREEN=1 forces it";
  if (has_int8_dots) {
    screening = has_amx ? "bf16" : "int8";
    screening +=
        " first, then the candidates exactly, in sequences of 128 rows and 6 topk blocks or more; "
        "MSA_SCREEN=0 or 1 forces a path";
    if (has_amx) screening += "; also up to 64 rows of bf16 queries and bf16 or float8 keys, from 8 topk blocks on";
  }
  info["screening"] = screening;

  if (o.json) {
    fmt::print("{}\n", info.dump(2));
    return;
  }
  std::string sets;
  for (const std::string& name : supported_instruction_sets()) sets += (sets.empty() ? "" : ", ") + name;
  fmt::print("msa {}\n\n", version());
  fmt::print("  backend cpu        instruction set {} (of {}; override: MSA_ISA)\n", active, sets);
  fmt::print("  backend reference  scalar float64, the executable specification\n");
  fmt::print("  backend cuda       {}\n", describe(cuda));
  fmt::print("  threads            {}\n", std::thread::hardware_concurrency());
  fmt::print(
      "  storage types      float32, bfloat16, float16, keys and values also float8_e4m3; float32 accumulation\n");
  fmt::print("  products           of bfloat16 {}; of other types float32\n",
             info["products"]["bfloat16"].get<std::string>());
  fmt::print("  screening          {}\n", info["screening"].get<std::string>());
  fmt::print("  geometry           block size {}..{} (powers of two), topk 1..{}, head dimensions {}..{} by {}\n",
             kMinBlockSize, kMaxBlockSize, kMaxTopk, kHeadDimMultiple, kMaxHeadDim, kHeadDimMultiple);
  fmt::print("\nPath of {} query / {} kv heads, head dim {}, value dim {}, index dim {}, block size {}, topk {}:\n",
             o.query_heads, o.kv_heads, o.head_dim, o.value_dim, o.index_dim, o.block_size, o.topk);
  for (const auto& [op, path] : info["paths"].items()) fmt::print("  {:<26} {}\n", op, path.get<std::string>());
  if (!cuda.built) return;
  fmt::print("\nOn a GPU (docs/cuda.md):\n");
  for (const CudaKernels& kernels : kCudaKernels) fmt::print("  {:<26} {}\n", kernels.op, cuda_path(kernels, o));
}

}  // namespace

void add_info_command(CLI::App& app) {
  auto options = std::make_shared<InfoOptions>();
  CLI::App* command = app.add_subcommand("info", "backends, instruction sets, threads, and the path a shape takes");
  command->add_flag("--json", options->json, "print JSON");
  command->add_option("--query-heads", options->query_heads, "query heads")->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "key/value heads")->capture_default_str();
  command->add_option("--head-dim", options->head_dim, "dimension of q and k")->capture_default_str();
  command->add_option("--value-dim", options->value_dim, "dimension of v (default: head dim)");
  command->add_option("--index-dim", options->index_dim, "dimension of the index branch (default: head dim)");
  command->add_option("--block-size", options->block_size, "tokens a block")->capture_default_str();
  command->add_option("--topk", options->topk, "blocks a query")->capture_default_str();
  command->callback([options] { print_info(*options); });
}

}  // namespace msa::app
