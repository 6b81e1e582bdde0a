// SPDX-License-Identifier: Apache-2.0
// Drives csrc/loader against the stub driver from C, for the sanitizers: drive STUB THREADS CALLS. Every thread
// launches with plans of its own choice, good ones and random ones; at the end the launches that the stub has seen are
// counted.
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machete_loader.h"

#define CHECK(condition)                                          \
  do                                                              \
    if (!(condition)) {                                           \
      fprintf(stderr, "line %d: not %s\n", __LINE__, #condition); \
      abort();                                                    \
    }                                                             \
  while (0)

static const char cubin[] = "stub-cubin\nkernel 0:384 384:136\n";
static void *library, *kernel, *context;
static int calls;
static atomic_int good;

// A function of the stub, by its type.
#define STUB(name, ...) ((int (*)(__VA_ARGS__))dlsym(library, name))

static uint64_t next(uint64_t* state) {  // xorshift64
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}

static machete_loader_plan plan_of(int32_t m) {
  return (machete_loader_plan){
      .magic = MACHETE_LOADER_PLAN,
      .size = sizeof(machete_loader_plan),
      .abi = MACHETE_ABI_VERSION,
      .options = MACHETE_LOADER_PAIRS | MACHETE_LOADER_ONE_PER_SM | MACHETE_LOADER_EVERY_SM,
      .grid = {64, 1, 1},
      .block = {352, 1, 1},
      .cluster = {2, 1, 1},
      .shared_memory = 100000,
      .acts = {.rank = 3, .box = {64, 8, 4}, .dims = {64, (uint64_t)m, 64}, .strides = {8192, 128}},
      .scales = {.rank = 2, .box = {128, 2}, .dims = {4096, 32}, .strides = {8192}},
      .zeros = {.rank = 2, .box = {128, 2}, .dims = {2048, 32}, .strides = {4096}},
      .params = {.m = m,
                 .n = 4096,
                 .k = 4096,
                 .scale_stride = 4096,
                 .zero_stride = 4096,
                 .out_stride = 4096,
                 .group_blocks = 4,
                 .flags = FLAG_INTEGER_ZEROS | FLAG_SCALE_MAPS,
                 .row_tiles = 32,
                 .token_tiles = (m + 7) / 8,
                 .steps = 16},
  };
}

static machete_loader_call call_of(const machete_loader_plan* plan) {
  return (machete_loader_call){
      .magic = MACHETE_LOADER_CALL,
      .size = sizeof(machete_loader_call),
      .options = MACHETE_LOADER_OVERLAP,
      .plan = plan,
      .kernel = kernel,
      .stream = (void*)0x5eed0,
      .context = context,
      .acts = (void*)0x7f0000000000,
      .weights = (void*)0x7f1000000000,
      .scales = (void*)0x7f2000000000,
      .zeros = (void*)0x7f3000000000,
      .out = (void*)0x7f4000000000,
  };
}

static void without_zeros(machete_loader_plan* plan, machete_loader_call* call) {
  plan->zeros = (machete_loader_map){0};
  plan->params.flags &= ~FLAG_INTEGER_ZEROS;
  plan->params.zero_stride = 0;
  call->zeros = NULL;
}

static void without_scale_maps(machete_loader_plan* plan) {
  plan->scales = plan->zeros = (machete_loader_map){0};
  plan->params.flags &= ~FLAG_SCALE_MAPS;
}

static void launch_all(uint64_t seed) {
  uint64_t state = seed * 2654435769u + 1;
  for (int i = 0; i < calls; ++i) {
    machete_loader_plan plan = plan_of(1 + (int32_t)(next(&state) % 500));
    machete_loader_call call = call_of(&plan);
    call.acts = (void*)(0x7f0000000000 + next(&state) % 300 * 4096);  // more than the thread's tensor maps
    call.scales = (void*)(0x7f2000000000 + next(&state) % 300 * 4096);
    const int kind = (int)(next(&state) % 4);
    if (kind == 0) without_zeros(&plan, &call);
    if (kind == 1) without_scale_maps(&plan);
    CHECK(machete_loader_launch(&call) == 0);
    atomic_fetch_add(&good, 1);
    uint8_t* bytes = (uint8_t*)&plan;
    const int count = 1 + (int)(next(&state) % 4);
    for (int j = 0; j < count; ++j) bytes[12 + next(&state) % (sizeof plan - 12)] = (uint8_t)next(&state);
    const int status = machete_loader_launch(&call);
    CHECK(status >= MACHETE_LOADER_MISALIGNED && (status > 0) == (machete_loader_result(status) > 0));
    CHECK((status == 0 || status > 0) == (machete_loader_check(&plan, sizeof plan) == 0) ||
          status == MACHETE_LOADER_NO_ADDRESS || status == MACHETE_LOADER_MISALIGNED);
    if (!status) atomic_fetch_add(&good, 1);
    for (size_t j = 0; j < sizeof plan; ++j) bytes[j] = (uint8_t)next(&state);
    CHECK(machete_loader_check(&plan, sizeof plan) == MACHETE_LOADER_BAD_PLAN);
  }
}

static void* thread(void* seed) {
  CHECK(machete_loader_init(NULL) == 0);
  launch_all((uint64_t)(uintptr_t)seed);
  return NULL;
}

static void check_maps(void) {
  const machete_loader_plan good_plan = plan_of(5);
  CHECK(machete_loader_check(&good_plan, sizeof good_plan) == MACHETE_LOADER_OK);
  machete_loader_plan wrong[11];
  for (int i = 0; i < 11; ++i) wrong[i] = good_plan;
  wrong[0].acts = (machete_loader_map){0};
  without_scale_maps(&wrong[1]);
  wrong[1].zeros = good_plan.zeros;                            // without scales
  wrong[2].scales = wrong[2].zeros = (machete_loader_map){0};  // and the flag is set
  wrong[3].params.flags &= ~FLAG_SCALE_MAPS;
  wrong[4].scales = (machete_loader_map){.rank = 1, .box = {128}, .dims = {4096}};
  wrong[5].zeros.rank = 0;  // with something left of it
  wrong[6].scales.rank = 3, wrong[6].scales.box[2] = 1, wrong[6].scales.dims[2] = 1, wrong[6].scales.strides[1] = 16;
  wrong[7].zeros = wrong[6].scales;
  wrong[8].scales.strides[0] = 8;
  wrong[9].zeros.box[1] = 257;
  wrong[10].scales.dims[2] = 1;
  for (int i = 0; i < 11; ++i) CHECK(machete_loader_check(&wrong[i], sizeof *wrong) == MACHETE_LOADER_BAD_PLAN);
}

static void check_refusals(void) {
  machete_loader_plan plan = plan_of(5);
  machete_loader_call call = call_of(&plan);
  CHECK(machete_loader_launch(NULL) == MACHETE_LOADER_BAD_CALL);
  call.options = 2;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_BAD_CALL);
  call = call_of(NULL);
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_BAD_CALL);
  call = call_of(&plan);
  call.weights = NULL;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_NO_ADDRESS);
  call = call_of(&plan);
  call.scales = (void*)8;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_MISALIGNED);
  call = call_of(&plan);
  call.acts = (void*)8;  // which the driver refuses
  const int status = machete_loader_launch(&call);
  CHECK(machete_loader_result(status) == 1 && !strcmp(machete_loader_function(status), "cuTensorMapEncodeTiled"));
  call = call_of(&plan);
  call.zeros = NULL;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_NO_ADDRESS);
  call = call_of(&plan);
  without_zeros(&plan, &call);
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_OK);
  call.zeros = (void*)0x7f3000000000;  // which the kernel would look for through a map that is not there
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_BAD_CALL);
  without_scale_maps(&plan);
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_OK);
  check_maps();
  plan = plan_of(5);
  call = call_of(&plan);
  plan.options = MACHETE_LOADER_EVERY_SM;  // which says nothing without ONE_PER_SM
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_BAD_PLAN);
  plan.options = MACHETE_LOADER_ONE_PER_SM;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_OK);
  plan.params.row_tiles = 0;  // padding reads the weights of one of them
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_BAD_PLAN);
  plan.params.row_tiles = 32;
  plan.workspace = 1024;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_NO_ADDRESS);
  plan.abi = 1;
  CHECK(machete_loader_launch(&call) == MACHETE_LOADER_WRONG_ABI);
  CHECK(machete_loader_check(&plan, sizeof plan - 1) == MACHETE_LOADER_BAD_PLAN);
  CHECK(!strcmp(machete_loader_status_name(MACHETE_LOADER_WRONG_ABI), "MACHETE_LOADER_WRONG_ABI"));
  CHECK(!strcmp(machete_loader_status_name(-1000), "an unknown status"));
  CHECK(!*machete_loader_function(-3) && !*machete_loader_function(1 << 30) && !machete_loader_result(-1));
}

int main(int count, char** arguments) {
  CHECK(count == 4);
  const int threads = atoi(arguments[2]);
  calls = atoi(arguments[3]);
  CHECK(machete_loader_launch("anything at all") == MACHETE_LOADER_NOT_INITIALISED);
  CHECK(machete_loader_init("no such library") == MACHETE_LOADER_NO_DRIVER);
  CHECK(machete_loader_init("libdl.so.2") == MACHETE_LOADER_NO_FUNCTION);
  library = dlopen(arguments[1], RTLD_NOW);
  CHECK(library);
  void *module, *function;
  CHECK(!STUB("stub_set", const char*, int)("record", 0));
  CHECK(!STUB("cuDevicePrimaryCtxRetain", void**, int)(&context, 0));
  CHECK(!STUB("cuCtxPushCurrent_v2", void*)(context));
  CHECK(!STUB("cuLibraryLoadData", void**, const void*, void*, void*, unsigned, void*, void*, unsigned)(
      &module, cubin, NULL, NULL, 0, NULL, NULL, 0));
  CHECK(!STUB("cuLibraryGetKernel", void**, void*, const char*)(&kernel, module, "kernel"));
  CHECK(!STUB("cuKernelGetFunction", void**, void*)(&function, kernel));
  CHECK(!STUB("cuKernelSetAttribute", int, int, void*, int)(8, 227 * 1024, kernel, 0));
  void* popped;
  CHECK(!STUB("cuCtxPopCurrent_v2", void**)(&popped));  // so that the loader pushes it

  pthread_t started[64];
  CHECK(threads <= 64);
  for (int i = 0; i < threads; ++i) CHECK(!pthread_create(&started[i], NULL, thread, (void*)(uintptr_t)(i + 1)));
  for (int i = 0; i < threads; ++i) CHECK(!pthread_join(started[i], NULL));
  CHECK(machete_loader_init(NULL) == 0);
  CHECK(machete_loader_version() == MACHETE_LOADER_VERSION && machete_loader_abi() == MACHETE_ABI_VERSION);
  check_refusals();
  void* current;
  CHECK(!STUB("cuCtxGetCurrent", void**)(&current) && !current);
  printf("%d launches, %d encodings\n", atomic_load(&good), STUB("stub_calls", const char*)("cuTensorMapEncodeTiled"));
  return 0;
}
