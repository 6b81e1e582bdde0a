// SPDX-License-Identifier: Apache-2.0
// A product without Python: opens a bundle, loads a kernel of it, launches it through csrc/loader and checks the
// result.
//
//   gemm BUNDLE MANIFEST_SHA256 [M N K] [--launch-only]
//
// The weights' codes are all 9, which stands for 1, so that prepacked weights are bytes of 0x99; scales differ by
// column and activations by row. Every sum is then known and exact. --launch-only leaves the result unread.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "driver.hpp"
#include "machete_loader.h"

namespace {

constexpr int kGroup = 128;         // k that share a scale
constexpr int kOneGroup = 1 << 26;  // GemmParams.group_blocks where that is all of K

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::uint16_t bf16(float value) {  // of values that bf16 holds exactly
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// A kernel for bf16 activations and u4b8 weights, one tile a CTA, with the widest tile that M fills.
const Json& choose(const Json& manifest, std::int64_t m) {
  const Json* best = nullptr;
  for (const Json& kernel : manifest["kernels"].items) {
    const Json &types = kernel["types"], &tile = kernel["tile"];
    if (types["a"].text != "bf16" || types["b"].text != "u4b8" || tile["family"].text != "stream") continue;
    const std::int64_t tokens = tile["tokens"].integer();
    if (!best || (tokens <= m && tokens > (*best)["tile"]["tokens"].integer())) best = &kernel;
  }
  if (!best) throw std::runtime_error("the bundle has no kernel of family stream for bf16 and u4b8");
  return *best;
}

machete_loader_map map_of(const std::vector<std::int64_t>& dims, const std::vector<std::int64_t>& strides,
                          const std::vector<std::int64_t>& box) {
  machete_loader_map map{};
  map.rank = static_cast<std::uint32_t>(dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) {
    map.dims[i] = static_cast<std::uint64_t>(dims[i]);
    map.box[i] = static_cast<std::uint32_t>(box[i]);
    if (i > 0) map.strides[i - 1] = static_cast<std::uint64_t>(strides[i - 1]);
  }
  return map;
}

// The groups of a ring stage of so many k, or 0 where they differ from one stage to the next.
std::int64_t stage_groups(std::int64_t stage_k, std::int64_t k) {
  if (kGroup >= k || kGroup % stage_k == 0) return 1;
  return stage_k % kGroup ? 0 : stage_k / kGroup;
}

// What machete_aot/launch.py derives for such a kernel and no division of K. Its sizes of shared memory, too.
machete_loader_plan plan_of(const Json& kernel, std::int64_t m, std::int64_t n, std::int64_t k) {
  const Json& tile = kernel["tile"];
  const std::int64_t rows = 64 * tile["row_warpgroups"].integer() * tile["blocks"].integer();
  const std::int64_t workers = tile["k_warpgroups"].integer(), units = workers * tile["units"].integer();
  const std::int64_t tokens = tile["tokens"].integer(), stages = tile["stages"].integer();
  const std::int64_t stage = units * (tokens * 128 + rows / 64 * 2048 + rows * 2);  // activations, weights, scales
  const std::int64_t a_stage = tokens < 128 ? 4 : 2;                                // barriers
  const std::int64_t ring = ceil_div(stages * stage + (a_stage * stages + 1) * 8, 128) * 128;
  const std::int64_t slabs = workers * (workers - 1) * (rows / 16 / workers) * 16 * tokens * 4;

  machete_loader_plan plan{};
  plan.magic = MACHETE_LOADER_PLAN;
  plan.size = sizeof plan;
  plan.abi = MACHETE_ABI_VERSION;
  // Nothing runs beside this one product, so not MACHETE_LOADER_ONE_PER_SM.
  plan.options = n % 8 == 0 ? MACHETE_LOADER_PAIRS : 0;
  const std::int64_t grid[3] = {ceil_div(n, rows), ceil_div(m, tokens), 1};
  for (int i = 0; i < 3; ++i) {
    plan.grid[i] = static_cast<std::uint32_t>(grid[i]);
    plan.block[i] = i ? 1 : static_cast<std::uint32_t>(kernel["threads"].integer());
    plan.cluster[i] = 1;
  }
  plan.shared_memory = static_cast<std::uint32_t>(ring + slabs);
  // k is a multiple of 64; a single tile of tokens is copied as far as it is filled.
  const bool full = m >= tokens;
  plan.acts = full ? map_of({64, m, k / 64}, {2 * k, 128}, {64, tokens, units}) : map_of({k, m}, {2 * k}, {64, m});
  const std::int64_t groups = stage_groups(64 * units, k);
  if (groups) plan.scales = map_of({n, ceil_div(k, kGroup)}, {2 * n}, {rows, groups});
  GemmParams& p = plan.params;
  p.flags = (full ? 0 : FLAG_ACTS_2D) | (groups ? FLAG_SCALE_MAPS : 0);
  p.m = static_cast<std::int32_t>(m);
  p.n = p.scale_stride = p.out_stride = static_cast<std::int32_t>(n);
  p.k = static_cast<std::int32_t>(k);
  p.group_blocks = kGroup >= k ? kOneGroup : kGroup / 32;
  p.code_zero = 8;
  p.row_tiles = static_cast<std::int32_t>(grid[0]);
  p.token_tiles = static_cast<std::int32_t>(grid[1]);
  p.steps = static_cast<std::int32_t>(ceil_div(k / 64, units));
  return plan;
}

void check(int code) {
  if (!code) return;
  const std::string function = machete_loader_function(code);
  if (function.empty()) throw std::runtime_error(machete_loader_status_name(code));
  throw std::runtime_error(function + " failed with CUresult " + std::to_string(machete_loader_result(code)));
}

template <typename T>
void* on_device(const Driver& driver, const std::vector<T>& values) {
  void* address = nullptr;
  driver.allocate(&address, values.size() * sizeof(T));
  driver.upload(address, values.data(), values.size() * sizeof(T));
  return address;
}

int run(const std::vector<std::string>& words, bool read) {
  const std::int64_t m = words.size() > 2 ? std::stol(words[2]) : 5;
  const std::int64_t n = words.size() > 3 ? std::stol(words[3]) : 256;
  const std::int64_t k = words.size() > 4 ? std::stol(words[4]) : 512;
  if (m < 1 || n < 8 || n % 8 || k < 64 || k % 64 || m * k >= INT32_MAX || n * k >= INT32_MAX)
    throw std::runtime_error("M must be positive, N a multiple of 8, K one of 64");
  const Bundle bundle(words[0], words[1]);
  if (bundle.manifest["abi"]["version"].integer() != MACHETE_ABI_VERSION)
    throw std::runtime_error("the bundle is for another version of the parameter block");
  const Json& chosen = choose(bundle.manifest, m);
  const std::string cubin = bundle.cubin(chosen);
  const machete_loader_plan plan = plan_of(chosen, m, n, k);

  const Driver driver;
  int device = 0, major = 0, minor = 0;
  void *context = nullptr, *library = nullptr, *kernel = nullptr, *function = nullptr;
  driver.init(0);
  driver.device(&device, 0);
  driver.attribute(&major, 75, device);  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, MINOR
  driver.attribute(&minor, 76, device);
  if (major != 9 || minor != 0) throw std::runtime_error("the kernels need a GPU of compute capability 9.0");
  driver.context(&context, device);
  driver.push(context);
  driver.load(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  driver.kernel(&kernel, library, chosen["symbol"].text.c_str());
  driver.function(&function, kernel);                                   // loads the code now
  driver.set(8, static_cast<int>(plan.shared_memory), kernel, device);  // MAX_DYNAMIC_SHARED_SIZE_BYTES
  driver.set(9, 100, kernel, device);                                   // PREFERRED_SHARED_MEMORY_CARVEOUT

  std::vector<std::uint16_t> acts, scales, out(static_cast<std::size_t>(m * n), 0x7fc0);
  for (std::int64_t i = 0; i < m * k; ++i) acts.push_back(bf16(static_cast<float>(1 + i / k % 4)));
  for (std::int64_t i = 0; i < ceil_div(k, kGroup) * n; ++i) scales.push_back(bf16(1.0f / (1 << i % n % 5)));
  const std::vector<std::uint8_t> weights(static_cast<std::size_t>(ceil_div(n, 64) * (k / 64) * 2048), 0x99);

  check(machete_loader_init(nullptr));
  machete_loader_call call{};
  call.magic = MACHETE_LOADER_CALL;
  call.size = sizeof call;
  call.plan = &plan;
  call.kernel = kernel;
  call.acts = on_device(driver, acts);
  call.weights = on_device(driver, weights);
  call.scales = on_device(driver, scales);
  call.out = on_device(driver, out);
  check(machete_loader_launch(&call));
  driver.synchronize();
  std::printf("%s: launched %u x %u CTAs of %u threads, %u bytes of shared memory\n", chosen["id"].text.c_str(),
              plan.grid[0], plan.grid[1], plan.block[0], plan.shared_memory);
  if (!read) return 0;

  driver.download(out.data(), call.out, out.size() * sizeof out[0]);
  for (std::int64_t i = 0; i < m * n; ++i) {
    const float expected = static_cast<float>(k * (1 + i / n % 4)) / static_cast<float>(1 << i % n % 5);
    const float found = from_bf16(out[static_cast<std::size_t>(i)]);
    if (!(found >= expected * 0.995f && found <= expected * 1.005f)) {  // rounded to bf16 once
      std::printf("out[%d][%d] = %g, expected %g\n", static_cast<int>(i / n), static_cast<int>(i % n), found, expected);
      return 1;
    }
  }
  std::printf("all %d results are right\n", static_cast<int>(m * n));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> words(arguments + 1, arguments + count);
  const bool read = words.empty() || words.back() != "--launch-only";
  if (!read) words.pop_back();
  if (words.size() != 2 && words.size() != 5) {
    std::fprintf(stderr, "usage: %s BUNDLE MANIFEST_SHA256 [M N K] [--launch-only]\n", arguments[0]);
    return 2;
  }
  try {
    return run(words, read);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
