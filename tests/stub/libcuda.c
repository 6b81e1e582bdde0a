// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 without a GPU: enough of the driver for the launch path, which records what would have been launched.
//
// A "cubin" here is text: "stub-cubin\n", then a line for each kernel: "<symbol> <offset>:<size> <offset>:<size> ...".
// An encoded tensor map holds its arguments (struct encoded), so that they can be read out of a launch's parameter
// bytes. Tests reach the stub through the functions stub_* at the end. Every thread has its own stack of contexts, as
// in the driver.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 8
#define MAX_KERNELS 64
#define MAX_LAUNCHES 4096
#define MAX_PARAMETERS 16
#define PARAMETERS_AT 112  // where the parameters begin in the device's layout; real ones lie at 112 and 496
#define MAX_CALLS 64

enum { SUCCESS, INVALID_VALUE, NO_DEVICE = 100, INVALID_DEVICE, INVALID_IMAGE = 200, INVALID_CONTEXT };
enum { NOT_FOUND = 500, UNSUPPORTED_IN_CAPTURE = 900 };

struct kernel {
  char symbol[128];
  int library;
  int count;
  uint64_t offset[MAX_PARAMETERS], size[MAX_PARAMETERS];
  int loaded[MAX_DEVICES];  // cuKernelGetFunction ran with this device's context current
  int attribute[MAX_DEVICES][32];
};

struct launch {  // read by tests/stub/harness.py: keep both alike
  char symbol[128];
  uint32_t grid[3], block[3], cluster[3];
  uint32_t shared_memory, programmatic, attributes, device, library, parameter_bytes;
  uint64_t stream;
  uint8_t parameters[520];
};

struct encoded {  // what an encoded tensor map holds, 128 bytes: read by tests/stub/harness.py
  uint32_t magic, type, rank, interleave, swizzle, promotion, fill, pad;
  uint64_t address, dims[3], strides[2];
  uint32_t box[3], element_strides[3];
  uint8_t rest[24];
};
_Static_assert(sizeof(struct encoded) == 128, "a CUtensorMap has 128 bytes");

struct attribute {
  int id;
  int pad;
  union {
    uint32_t dim[3];
    int flag;
    char bytes[64];
  } value;
};
struct config {
  uint32_t grid[3], block[3], shared_memory;
  void* stream;
  struct attribute* attributes;
  uint32_t count;
};

static struct knob {
  const char* name;
  int value;
} knobs[] = {{"major", 9},
             {"minor", 0},
             {"driver", 13000},
             {"devices", 1},
             {"sms", 132},
             {"clock_khz", 1980000},
             {"memory_khz", 2619000},
             {"memory_bits", 5120},
             {"capturing", 0},
             {"slow_load_us", 0},
             {"h100", 0},
             {"record", 1}};
static struct call {
  char name[64];
  int count, fail_with, hidden;
} calls[MAX_CALLS];
static int call_count;
static struct kernel kernels[MAX_KERNELS];
static int kernel_count, library_count;
static struct launch launches[MAX_LAUNCHES];
static int launch_count;
static char contexts[MAX_DEVICES];  // a context is the address of its device's byte
static __thread void* stack[16];
static __thread int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int knob(const char* name) {
  for (unsigned i = 0; i < sizeof knobs / sizeof *knobs; ++i)
    if (!strcmp(knobs[i].name, name)) return knobs[i].value;
  abort();
}

static struct call* find(const char* name) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < call_count && strcmp(calls[i].name, name)) ++i;
  if (i == call_count) {
    if (call_count == MAX_CALLS) abort();
    snprintf(calls[call_count++].name, sizeof calls->name, "%s", name);
  }
  pthread_mutex_unlock(&lock);
  return &calls[i];
}

// Counts the call; the result that a test asked for, or 0.
static int enter(const char* name) {
  struct call* c = find(name);
  __atomic_add_fetch(&c->count, 1, __ATOMIC_SEQ_CST);
  return c->fail_with;
}
#define ENTER()                     \
  do {                              \
    int failure_ = enter(__func__); \
    if (failure_) return failure_;  \
  } while (0)

static int current_device(void) { return depth ? (int)((char*)stack[depth - 1] - contexts) : -1; }

// ---- the driver ----

EXPORT int cuInit(unsigned flags) {
  (void)flags;
  ENTER();
  return knob("devices") ? SUCCESS : NO_DEVICE;
}
EXPORT int cuDriverGetVersion(int* version) {
  ENTER();
  *version = knob("driver");
  return SUCCESS;
}
EXPORT int cuDeviceGetCount(int* count) {
  ENTER();
  *count = knob("devices");
  return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
  ENTER();
  if (ordinal < 0 || ordinal >= knob("devices")) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int length, int device) {
  ENTER();
  if (knob("h100")) snprintf(name, (size_t)length, "NVIDIA H100 80GB HBM3");
  else snprintf(name, (size_t)length, "Stub %d", device);
  return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER();
  (void)device;
  if (attribute == 16) *value = knob("sms");
  else if (attribute == 13) *value = knob("clock_khz");
  else if (attribute == 36) *value = knob("memory_khz");
  else if (attribute == 37) *value = knob("memory_bits");
  else if (attribute == 75) *value = knob("major");
  else if (attribute == 76) *value = knob("minor");
  else if (attribute == 97) *value = 227 * 1024;  // shared memory that a CTA may ask for
  else return INVALID_VALUE;
  return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER();
  *context = &contexts[device];
  return SUCCESS;
}

EXPORT int cuCtxGetCurrent(void** context) {
  ENTER();
  *context = depth ? stack[depth - 1] : NULL;
  return SUCCESS;
}

EXPORT int cuCtxPushCurrent_v2(void* context) {
  ENTER();
  if (depth == 16) return INVALID_VALUE;
  stack[depth++] = context;
  return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(void** context) {
  ENTER();
  if (!depth) return INVALID_CONTEXT;
  *context = stack[--depth];
  return SUCCESS;
}

EXPORT int cuStreamIsCapturing(void* stream, int* status) {
  ENTER();
  if (!stream && !depth) return INVALID_CONTEXT;  // the default stream is that of the current context
  *status = knob("capturing");
  return SUCCESS;
}

static int parse(const char* text, int library) {
  static const char magic[] = "stub-cubin\n";
  if (strncmp(text, magic, sizeof magic - 1)) return INVALID_IMAGE;
  char *copy = strdup(text + sizeof magic - 1), *line_end = NULL;
  for (char* line = strtok_r(copy, "\n", &line_end); line; line = strtok_r(NULL, "\n", &line_end)) {
    struct kernel* k = &kernels[kernel_count++];
    if (kernel_count > MAX_KERNELS) abort();
    char *word_end = NULL, *word = strtok_r(line, " ", &word_end);
    snprintf(k->symbol, sizeof k->symbol, "%s", word);
    k->library = library;
    while ((word = strtok_r(NULL, " ", &word_end)) && k->count < MAX_PARAMETERS) {
      k->offset[k->count] = strtoull(word, &word, 10);
      k->size[k->count++] = strtoull(word + 1, NULL, 10);
    }
  }
  free(copy);
  return SUCCESS;
}

static void pause_us(int us) {
  if (us) nanosleep(&(struct timespec){.tv_nsec = us * 1000L}, NULL);
}

EXPORT int cuLibraryLoadData(void** library, const void* code, void* jit, void* jit_values, unsigned jit_count,
                             void* options, void* option_values, unsigned option_count) {
  ENTER();
  (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)option_values, (void)option_count;
  if (knob("capturing")) return UNSUPPORTED_IN_CAPTURE;
  pause_us(knob("slow_load_us"));
  pthread_mutex_lock(&lock);
  int id = ++library_count, result = parse(code, id);
  pthread_mutex_unlock(&lock);
  *library = (void*)(intptr_t)id;
  return result;
}

EXPORT int cuLibraryUnload(void* library) {
  ENTER();
  (void)library;
  return SUCCESS;
}

EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  ENTER();
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].library == (int)(intptr_t)library && !strcmp(kernels[i].symbol, name)) {
      *kernel = &kernels[i];
      return SUCCESS;
    }
  return NOT_FOUND;
}

EXPORT int cuKernelGetFunction(void** function, struct kernel* kernel) {
  ENTER();
  if (!depth) return INVALID_CONTEXT;
  kernel->loaded[current_device()] = 1;
  *function = kernel;
  return SUCCESS;
}

EXPORT int cuKernelSetAttribute(int attribute, int value, struct kernel* kernel, int device) {
  ENTER();
  if (attribute < 0 || attribute >= 32) return INVALID_VALUE;
  kernel->attribute[device][attribute] = value;
  return SUCCESS;
}

EXPORT int cuKernelGetParamInfo(struct kernel* kernel, size_t index, size_t* offset, size_t* size) {
  ENTER();
  if (index >= (size_t)kernel->count) return INVALID_VALUE;
  *offset = PARAMETERS_AT + kernel->offset[index];
  *size = kernel->size[index];
  return SUCCESS;
}

EXPORT int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                  int interleave, int swizzle, int promotion, int fill) {
  ENTER();
  if (!depth) return INVALID_CONTEXT;
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 1 || rank > 3) return INVALID_VALUE;
  struct encoded e = {.magic = 0x7e5709a9,
                      .type = (uint32_t)type,
                      .rank = rank,
                      .interleave = (uint32_t)interleave,
                      .swizzle = (uint32_t)swizzle,
                      .promotion = (uint32_t)promotion,
                      .fill = (uint32_t)fill,
                      .address = (uintptr_t)address};
  for (uint32_t i = 0; i < rank; ++i) {
    if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || !element_strides[i]) return INVALID_VALUE;
    e.dims[i] = dims[i], e.box[i] = box[i], e.element_strides[i] = element_strides[i];
    if (!i) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40) return INVALID_VALUE;
    e.strides[i - 1] = strides[i - 1];
  }
  if (box[0] * 2 % 16 || (swizzle == 3 && box[0] * 2 > 128)) return INVALID_VALUE;
  memcpy(map, &e, sizeof e);
  return SUCCESS;
}

EXPORT int cuLaunchKernelEx(const struct config* config, struct kernel* kernel, void** parameters, void** extra) {
  ENTER();
  if (!depth) return INVALID_CONTEXT;
  int device = current_device();
  if (extra || !kernel->loaded[device]) return INVALID_VALUE;
  if (config->shared_memory > (uint32_t)kernel->attribute[device][8]) return INVALID_VALUE;
  struct launch r = {.shared_memory = config->shared_memory,
                     .attributes = config->count,
                     .device = (uint32_t)device,
                     .library = (uint32_t)kernel->library,
                     .stream = (uintptr_t)config->stream,
                     .cluster = {1, 1, 1}};
  memcpy(r.symbol, kernel->symbol, sizeof r.symbol);
  memcpy(r.grid, config->grid, sizeof r.grid);
  memcpy(r.block, config->block, sizeof r.block);
  for (uint32_t i = 0; i < config->count; ++i) {
    const struct attribute* a = &config->attributes[i];
    if (a->id == 4) memcpy(r.cluster, a->value.dim, sizeof r.cluster);
    else if (a->id == 6) r.programmatic = (uint32_t)a->value.flag;
    else return INVALID_VALUE;
  }
  for (int i = 0; i < 3; ++i)
    if (!r.grid[i] || (i && r.grid[i] > 65535) || r.grid[i] % r.cluster[i]) return INVALID_VALUE;
  for (int i = 0; i < kernel->count; ++i) {
    uint64_t end = kernel->offset[i] + kernel->size[i];
    if (end > sizeof r.parameters) return INVALID_VALUE;
    memcpy(r.parameters + kernel->offset[i], parameters[i], kernel->size[i]);
    if (end > r.parameter_bytes) r.parameter_bytes = (uint32_t)end;
  }
  if (!knob("record")) return SUCCESS;
  pthread_mutex_lock(&lock);
  if (launch_count == MAX_LAUNCHES) abort();
  launches[launch_count++] = r;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

// Memory of the host stands for the device's.
EXPORT int cuMemAlloc_v2(void** address, size_t size) {
  ENTER();
  if (!depth) return INVALID_CONTEXT;
  return posix_memalign(address, 256, size) ? 2 : SUCCESS;
}
EXPORT int cuMemcpyHtoD_v2(void* to, const void* from, size_t size) {
  ENTER();
  memcpy(to, from, size);
  return SUCCESS;
}
EXPORT int cuMemcpyDtoH_v2(void* to, const void* from, size_t size) {
  ENTER();
  memcpy(to, from, size);
  return SUCCESS;
}
EXPORT int cuCtxSynchronize(void) {
  ENTER();
  return depth ? SUCCESS : INVALID_CONTEXT;
}

EXPORT int cuGetProcAddress_v2(const char* symbol, void** address, int version, uint64_t flags, int* status);
EXPORT int cuGetProcAddress(const char* symbol, void** address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, address, version, flags, NULL);
}

#define ENTRY(name, since) {#name, (void*)name, since}
static const struct {
  const char* name;
  void* address;
  int since;  // the CUDA version that it came with, in this form
} table[] = {ENTRY(cuInit, 2000),
             ENTRY(cuDriverGetVersion, 2020),
             ENTRY(cuDeviceGetCount, 2000),
             ENTRY(cuDeviceGet, 2000),
             ENTRY(cuDeviceGetName, 2000),
             ENTRY(cuDeviceGetAttribute, 2000),
             ENTRY(cuDevicePrimaryCtxRetain, 7000),
             ENTRY(cuCtxGetCurrent, 4000),
             ENTRY(cuStreamIsCapturing, 10000),
             {"cuCtxPushCurrent", (void*)cuCtxPushCurrent_v2, 4000},
             {"cuCtxPopCurrent", (void*)cuCtxPopCurrent_v2, 4000},
             ENTRY(cuLibraryLoadData, 12000),
             ENTRY(cuLibraryUnload, 12000),
             ENTRY(cuLibraryGetKernel, 12000),
             ENTRY(cuKernelGetFunction, 12000),
             ENTRY(cuKernelSetAttribute, 12000),
             ENTRY(cuKernelGetParamInfo, 12040),
             ENTRY(cuTensorMapEncodeTiled, 12000),
             ENTRY(cuLaunchKernelEx, 11060)};

EXPORT int cuGetProcAddress_v2(const char* symbol, void** address, int version, uint64_t flags, int* status) {
  (void)flags;
  *address = NULL;
  if (version > knob("driver")) return INVALID_VALUE;  // the driver is older than what is asked for
  for (unsigned i = 0; i < sizeof table / sizeof *table; ++i)
    if (!strcmp(table[i].name, symbol) && table[i].since <= version && !find(symbol)->hidden)
      *address = table[i].address;
  if (!strcmp(symbol, "cuGetProcAddress"))
    *address = version < 12000 ? (void*)cuGetProcAddress : (void*)cuGetProcAddress_v2;
  if (status) *status = *address ? 0 : 1;
  return *address ? SUCCESS : NOT_FOUND;
}

// ---- for the tests ----

EXPORT int stub_set(const char* name, int value) {
  for (unsigned i = 0; i < sizeof knobs / sizeof *knobs; ++i)
    if (!strcmp(knobs[i].name, name)) return knobs[i].value = value, 0;
  return -1;
}
EXPORT void stub_fail(const char* name, int code) { find(name)->fail_with = code; }
EXPORT void stub_hide(const char* name) { find(name)->hidden = 1; }
EXPORT int stub_calls(const char* name) { return find(name)->count; }
EXPORT int stub_launch_count(void) { return launch_count; }
EXPORT const struct launch* stub_launch(int index) { return &launches[index]; }
// Microseconds of what the stub does in one launch by the loader: cuCtxGetCurrent, a push and a pop around it, and
// cuLaunchKernelEx of a kernel with two parameters. For benchmarks/launch.py.
EXPORT double stub_time_launches(struct kernel* kernel, void* context, int count) {
  uint8_t tensor_maps[384] = {0}, block[256] = {0};
  void *parameters[2] = {tensor_maps, block}, *current;
  struct attribute overlap = {.id = 6, .value.flag = 1};
  struct config config = {.grid = {1, 1, 1}, .block = {128, 1, 1}, .attributes = &overlap, .count = 1};
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < count; ++i)
    if (cuCtxGetCurrent(&current) || cuCtxPushCurrent_v2(context) ||
        cuLaunchKernelEx(&config, kernel, parameters, NULL) || cuCtxPopCurrent_v2(&current))
      return -1;
  clock_gettime(CLOCK_MONOTONIC, &end);
  return ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / count / 1e3;
}
EXPORT int stub_kernel_attribute(const char* symbol, int device, int attribute) {
  for (int i = 0; i < kernel_count; ++i)
    if (!strcmp(kernels[i].symbol, symbol)) return kernels[i].attribute[device][attribute];
  return -1;
}
