// SPDX-License-Identifier: Apache-2.0
// See machete_loader.h. C11 and POSIX dlopen; cuda.h is not needed, what the driver reads is declared below.
#include "machete_loader.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

_Static_assert(sizeof(void*) == 8, "addresses have 64 bits");
_Static_assert(sizeof(machete_loader_map) == 56, "machete_aot/loader.py packs 56 bytes");
_Static_assert(sizeof(machete_loader_plan) == 368, "machete_aot/loader.py packs 368 bytes");
_Static_assert(sizeof(machete_loader_call) == 120, "machete_aot/loader.py packs 120 bytes");

// ---- what of cuda.h is needed ----

enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };    // CUlaunchAttributeID
enum { UINT16 = 1, NO_INTERLEAVE = 0, PROMOTE_256B = 3, FILL_ZERO = 0 };  // CUtensorMap...
enum { SWIZZLE_NONE = 0, SWIZZLE_128B = 3 };                              // CUtensorMapSwizzle
enum { MAX_BOX = 256, MAX_CLUSTER = 16, MAX_THREADS = 1024, MAX_GRID_YZ = 65535, MAX_SHARED = 227 * 1024 };
// Bytes of shared memory of an SM of compute capability 9.0, of it what a CTA takes beside what it asks for, and what
// two CTAs of an SM cannot both have, in the unit in which it is handed out.
enum { SM_SHARED = 228 * 1024, CTA_RESERVED = 1024, OVER_HALF = SM_SHARED / 2 - CTA_RESERVED + 512 };
#define MAX_DIM (UINT64_C(1) << 32)
#define MAX_STRIDE (UINT64_C(1) << 40)

typedef struct launch_attribute {  // CUlaunchAttribute
  int32_t id;
  char pad[4];
  union {
    char bytes[64];
    uint32_t cluster[3];
    int32_t allowed;
  } value;
} launch_attribute;
_Static_assert(sizeof(launch_attribute) == 72, "CUlaunchAttribute has 72 bytes");

typedef struct launch_config {  // CUlaunchConfig
  uint32_t grid[3], block[3], shared_memory;
  void* stream;
  launch_attribute* attributes;
  uint32_t count;
} launch_config;
_Static_assert(sizeof(launch_config) == 56 && offsetof(launch_config, stream) == 32, "CUlaunchConfig has 56 bytes");

typedef int encode_function(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                            const uint32_t*, int, int, int, int);
typedef int launch_function(const launch_config*, void*, void**, void**);
typedef int get_context_function(void**);
typedef int push_context_function(void*);

enum { ENCODE, LAUNCH, GET_CONTEXT, PUSH_CONTEXT, POP_CONTEXT, FUNCTIONS };
static const char* const names[FUNCTIONS] = {"cuTensorMapEncodeTiled", "cuLaunchKernelEx", "cuCtxGetCurrent",
                                             "cuCtxPushCurrent", "cuCtxPopCurrent"};
static const char* const symbols[FUNCTIONS] = {"cuTensorMapEncodeTiled", "cuLaunchKernelEx", "cuCtxGetCurrent",
                                               "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"};

// ---- state ----

static _Atomic(void*) functions[FUNCTIONS];  // threads that find them at the same time store the same addresses
static atomic_bool ready;
static _Atomic uint64_t next_token;

// Tensor maps of this thread. A map depends on an address and on what the plan says of it, and on nothing else: not on
// what lies there, nor on the device. So an entry is never wrong, and a set drops its oldest. There is room for a model
// whose layers each have a map of their scales.
enum { MAP_BYTES = 128, WAYS = 4, SETS = 128 };
typedef struct map_key {
  uint64_t address;
  uint64_t dims[3], strides[2];
  uint32_t box[3];
  uint16_t rank;  // 0: an entry that was never used
  uint16_t swizzle;
} map_key;
_Static_assert(sizeof(map_key) == 64, "keys are compared as bytes, so they have no padding");
typedef struct map_set {
  _Alignas(64) uint8_t maps[WAYS][MAP_BYTES];
  map_key keys[WAYS];
  uint64_t oldest;
} map_set;
static _Thread_local map_set cache[SETS];

// The last launch of this thread: context and stream (every device has a default stream of the same address), and the
// shared memory of each CTA if every SM has one, else 0.
static _Thread_local struct {
  void *context, *stream;
  uint32_t shared_memory;
} last;

// ---- the driver ----

static int failed(int function, int result) { return result ? (function + 1) << 16 | (result & 0xffff) : 0; }

int machete_loader_result(int code) { return code > 0 ? code & 0xffff : 0; }

const char* machete_loader_function(int code) {
  const int function = (code >> 16) - 1;
  return code > 0 && function >= 0 && function < FUNCTIONS ? names[function] : "";
}

const char* machete_loader_status_name(int code) {
  static const char* const status[] = {
      "MACHETE_LOADER_OK",          "MACHETE_LOADER_NOT_INITIALISED", "MACHETE_LOADER_NO_DRIVER",
      "MACHETE_LOADER_NO_FUNCTION", "MACHETE_LOADER_BAD_CALL",        "MACHETE_LOADER_BAD_PLAN",
      "MACHETE_LOADER_WRONG_ABI",   "MACHETE_LOADER_NO_ADDRESS",      "MACHETE_LOADER_MISALIGNED"};
  if (code > 0) return "a driver call failed";
  if (code < MACHETE_LOADER_MISALIGNED) return "an unknown status";
  return status[-code];
}

uint32_t machete_loader_version(void) { return MACHETE_LOADER_VERSION; }

uint32_t machete_loader_abi(void) { return MACHETE_ABI_VERSION; }

void machete_loader_seed(uint64_t token) { atomic_store(&next_token, token); }

int machete_loader_init(const char* libcuda) {
  if (atomic_load_explicit(&ready, memory_order_acquire)) return MACHETE_LOADER_OK;
  void* library = dlopen(libcuda ? libcuda : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // never closed
  if (!library) return MACHETE_LOADER_NO_DRIVER;
  void* found[FUNCTIONS];
  for (int i = 0; i < FUNCTIONS; ++i)
    if (!(found[i] = dlsym(library, symbols[i]))) {
      dlclose(library);
      return MACHETE_LOADER_NO_FUNCTION;
    }
  for (int i = 0; i < FUNCTIONS; ++i) atomic_store_explicit(&functions[i], found[i], memory_order_relaxed);
  atomic_store_explicit(&ready, true, memory_order_release);
  return MACHETE_LOADER_OK;
}

static void* driver(int function) { return atomic_load_explicit(&functions[function], memory_order_relaxed); }

// ---- plans ----

static bool between(uint64_t value, uint64_t least, uint64_t most) { return value >= least && value <= most; }

static bool is_map(const machete_loader_map* map) {
  bool good = map->rank == 0 || between(map->rank, 2, 3);
  for (uint32_t i = 0; i < 3; ++i)
    if (i < map->rank) good &= between(map->dims[i], 1, MAX_DIM) && between(map->box[i], 1, MAX_BOX);
    else good &= map->dims[i] == 0 && map->box[i] == 0;
  for (uint32_t i = 0; i < 2; ++i)
    if (i + 1 < map->rank) good &= between(map->strides[i], 16, MAX_STRIDE - 1) && map->strides[i] % 16 == 0;
    else good &= map->strides[i] == 0;
  return good;
}

static int check_plan(const machete_loader_plan* p) {
  if (p->magic != MACHETE_LOADER_PLAN || p->size != sizeof *p) return MACHETE_LOADER_BAD_PLAN;
  if (p->abi != MACHETE_ABI_VERSION) return MACHETE_LOADER_WRONG_ABI;
  const uint32_t placed = MACHETE_LOADER_ONE_PER_SM | MACHETE_LOADER_EVERY_SM;
  if (p->options & ~(MACHETE_LOADER_PAIRS | placed)) return MACHETE_LOADER_BAD_PLAN;
  if ((p->options & placed) == MACHETE_LOADER_EVERY_SM) return MACHETE_LOADER_BAD_PLAN;
  bool good = between(p->grid[0], 1, INT32_MAX) && p->shared_memory <= MAX_SHARED;
  uint64_t threads = 1, ctas = 1;
  for (int i = 0; i < 3; ++i) {
    good &= between(p->block[i], 1, MAX_THREADS) && between(p->cluster[i], 1, MAX_CLUSTER);
    good &= i == 0 || between(p->grid[i], 1, MAX_GRID_YZ);
    good = good && p->grid[i] % p->cluster[i] == 0;
    threads *= p->block[i];
    ctas *= p->cluster[i];
  }
  good &= threads <= MAX_THREADS && ctas <= MAX_CLUSTER;
  good &= is_map(&p->acts) && is_map(&p->scales) && is_map(&p->zeros);
  good &= p->acts.rank != 0 && p->scales.rank != 3 && p->zeros.rank != 3 && (p->scales.rank || !p->zeros.rank);
  const GemmParams* g = &p->params;
  const int32_t known = FLAG_ACTS_2D | FLAG_INTEGER_ZEROS | FLAG_OUT_FP32 | FLAG_OUT_BF16 | FLAG_OUT_FP16 |
                        FLAG_SWIGLU | FLAG_SCALE_MAPS | FLAG_ONE_PER_SM;
  good &= g->m > 0 && g->n > 0 && g->k > 0 && g->group_blocks > 0 && g->scale_stride >= 0 && g->zero_stride >= 0;
  good &= g->out_stride >= 0 && g->row_tiles > 0 && g->token_tiles > 0 && g->steps >= 0 && g->even_tiles >= 0;
  good &= g->share_steps >= 0 && g->longer_shares >= 0 && g->late_steps >= 0 && !(g->flags & ~known);
  good &= !(g->flags & FLAG_ACTS_2D) == (p->acts.rank == 3) && !(g->flags & FLAG_SCALE_MAPS) == !p->scales.rank;
  return good ? MACHETE_LOADER_OK : MACHETE_LOADER_BAD_PLAN;
}

int machete_loader_check(const void* plan, size_t size) {
  machete_loader_plan copy;
  if (!plan || size != sizeof copy) return MACHETE_LOADER_BAD_PLAN;
  memcpy(&copy, plan, sizeof copy);
  return check_plan(&copy);
}

static int check_addresses(const machete_loader_call* c, const machete_loader_plan* p) {
  if (!c->acts || !c->weights || !c->scales || !c->out) return MACHETE_LOADER_NO_ADDRESS;
  if ((p->zeros.rank && !c->zeros) || (p->workspace && !c->workspace)) return MACHETE_LOADER_NO_ADDRESS;
  if (c->zeros && p->scales.rank && !p->zeros.rank) return MACHETE_LOADER_BAD_CALL;  // the kernel would read a null map
  // The driver itself refuses activations that are not on 16 bytes.
  const uintptr_t pieces = (uintptr_t)c->weights | (uintptr_t)c->scales | (uintptr_t)c->zeros | (uintptr_t)c->workspace;
  const uintptr_t words = (uintptr_t)c->channel_scales | (uintptr_t)c->token_scales;
  const uintptr_t halves = (uintptr_t)c->bias | (uintptr_t)c->out;
  const uintptr_t outs = p->params.flags & FLAG_OUT_FP32 ? (uintptr_t)c->out : 0;
  return pieces % 16 || (words | outs) % 4 || halves % 2 ? MACHETE_LOADER_MISALIGNED : MACHETE_LOADER_OK;
}

// ---- launching ----

static unsigned set_of(const map_key* key) {
  uint64_t hash = key->address >> 4;
  hash = (hash ^ key->dims[0] << 40 ^ key->dims[1] << 20 ^ key->dims[2] ^ (uint64_t)key->box[1] << 52);
  hash *= UINT64_C(0x9e3779b97f4a7c15);
  return (unsigned)(hash >> 57);  // the upper seven bits depend on all others
}
_Static_assert(SETS == 128, "set_of returns seven bits");

// Copies the tensor map of what lies at ``address`` to ``to``, because the next look-up may drop it from the cache;
// zeros where there is none.
static int tensor_map(const machete_loader_map* map, int swizzle, const void* address, uint8_t* to) {
  if (!map->rank) {
    memset(to, 0, MAP_BYTES);
    return MACHETE_LOADER_OK;
  }
  map_key key = {.address = (uintptr_t)address, .rank = (uint16_t)map->rank, .swizzle = (uint16_t)swizzle};
  memcpy(key.dims, map->dims, sizeof key.dims);
  memcpy(key.strides, map->strides, sizeof key.strides);
  memcpy(key.box, map->box, sizeof key.box);
  map_set* set = &cache[set_of(&key)];
  for (int i = 0; i < WAYS; ++i)
    if (!memcmp(&set->keys[i], &key, sizeof key)) {
      memcpy(to, set->maps[i], MAP_BYTES);
      return MACHETE_LOADER_OK;
    }
  static const uint32_t element_strides[3] = {1, 1, 1};
  const unsigned way = set->oldest % WAYS;
  set->keys[way].rank = 0;  // a failed encoding leaves nothing behind
  const int result = ((encode_function*)driver(ENCODE))(set->maps[way], UINT16, key.rank, (void*)(uintptr_t)key.address,
                                                        key.dims, key.strides, key.box, element_strides, NO_INTERLEAVE,
                                                        swizzle, PROMOTE_256B, FILL_ZERO);
  if (result) return failed(ENCODE, result);
  set->keys[way] = key;
  ++set->oldest;
  memcpy(to, set->maps[way], MAP_BYTES);
  return MACHETE_LOADER_OK;
}

// What the launch asks for: what the kernel needs, or more, see MACHETE_LOADER_ONE_PER_SM. machete_aot/placement.py
// says why.
static uint32_t shared_memory(const machete_loader_call* c, const machete_loader_plan* p) {
  uint32_t bytes = p->shared_memory;
  if (p->options & MACHETE_LOADER_ONE_PER_SM) {
    const uint32_t beside = last.context == c->context && last.stream == c->stream ? last.shared_memory : 0;
    const bool fits = beside && beside + bytes + 2 * CTA_RESERVED <= SM_SHARED;
    if (!fits && bytes < OVER_HALF) bytes = OVER_HALF;
  }
  last.context = c->context;
  last.stream = c->stream;
  last.shared_memory = p->options & MACHETE_LOADER_EVERY_SM ? bytes : 0;
  return bytes;
}

static int launch(const machete_loader_call* c, const machete_loader_plan* p) {
  _Alignas(64) uint8_t maps[3][MAP_BYTES];  // the kernel's first parameter
  int encoded = tensor_map(&p->acts, SWIZZLE_128B, c->acts, maps[0]);
  if (!encoded) encoded = tensor_map(&p->scales, SWIZZLE_NONE, c->scales, maps[1]);
  if (!encoded) encoded = tensor_map(&p->zeros, SWIZZLE_NONE, c->zeros, maps[2]);
  if (encoded) return encoded;
  GemmParams params = p->params;
  params.weights = c->weights;
  params.scales = c->scales;
  params.zeros = c->zeros;
  params.bias = c->bias;
  params.channel_scales = c->channel_scales;
  params.token_scales = c->token_scales;
  params.out = c->out;
  params.workspace = c->workspace;
  params.token = atomic_fetch_add_explicit(&next_token, 1, memory_order_relaxed);
  if (p->options & MACHETE_LOADER_PAIRS && (uintptr_t)c->out % 4 == 0) params.flags |= FLAG_STORE_PAIRS;
  launch_attribute attributes[2] = {{0}};
  launch_config config = {.shared_memory = shared_memory(c, p), .stream = c->stream, .attributes = attributes};
  memcpy(config.grid, p->grid, sizeof config.grid);
  memcpy(config.block, p->block, sizeof config.block);
  if (p->cluster[0] != 1 || p->cluster[1] != 1 || p->cluster[2] != 1) {
    launch_attribute* attribute = &attributes[config.count++];
    attribute->id = CLUSTER_DIMENSION;
    memcpy(attribute->value.cluster, p->cluster, sizeof attribute->value.cluster);
  }
  if (c->options & MACHETE_LOADER_OVERLAP) {
    launch_attribute* attribute = &attributes[config.count++];
    attribute->id = PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute->value.allowed = 1;
  }
  void* parameters[2] = {maps, &params};
  return failed(LAUNCH, ((launch_function*)driver(LAUNCH))(&config, c->kernel, parameters, NULL));
}

int machete_loader_launch(const void* call) {
  machete_loader_call c;
  machete_loader_plan plan;
  if (!atomic_load_explicit(&ready, memory_order_acquire)) return MACHETE_LOADER_NOT_INITIALISED;
  if (!call) return MACHETE_LOADER_BAD_CALL;
  memcpy(&c, call, sizeof(uint32_t[2]));  // no more before it is known that there is more
  if (c.magic != MACHETE_LOADER_CALL || c.size != sizeof c) return MACHETE_LOADER_BAD_CALL;
  memcpy(&c, call, sizeof c);
  if (c.options & ~(uint32_t)MACHETE_LOADER_OVERLAP || c.reserved || !c.plan || !c.kernel)
    return MACHETE_LOADER_BAD_CALL;
  memcpy(&plan, c.plan, sizeof plan);
  int status = check_plan(&plan);
  if (!status) status = check_addresses(&c, &plan);
  if (status) return status;
  bool pushed = false;
  if (c.context) {
    void* current = NULL;
    const int result = ((get_context_function*)driver(GET_CONTEXT))(&current);
    if (result) return failed(GET_CONTEXT, result);
    if (current != c.context) {
      const int push = ((push_context_function*)driver(PUSH_CONTEXT))(c.context);
      if (push) return failed(PUSH_CONTEXT, push);
      pushed = true;
    }
  }
  status = launch(&c, &plan);
  if (pushed) {
    void* popped;
    const int result = ((get_context_function*)driver(POP_CONTEXT))(&popped);
    if (!status && result) status = failed(POP_CONTEXT, result);
  }
  return status;
}
