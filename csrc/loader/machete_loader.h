// SPDX-License-Identifier: Apache-2.0
// Launches kernels of a machete-aot bundle: a C library without dependencies but the CUDA driver, which it loads at run
// time. Python calls it through ctypes; other programs link it or open it with dlopen.
//
// A *plan* holds all that one shape of a product fixes, a *call* the rest: addresses, the stream, the kernel. Both are
// plain structs that the caller owns and may share between threads, as long as nobody writes to them. A launch checks
// both, encodes the tensor maps of activations, scales and zeros unless this thread did so lately, fills in the
// parameter block and calls cuLaunchKernelEx. It allocates nothing but, once for each thread, the storage of that
// thread's tensor maps and of what it launched last.
//
// Functions return 0, a negative machete_loader_status, or what a driver call returned, see machete_loader_result. All
// of them may be called from any thread at any time. After fork() a child needs the CUDA driver to be uninitialised in
// its parent, as always; the library itself has no locks and survives.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "gemm_params.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define MACHETE_LOADER_API
#else
#define MACHETE_LOADER_API __attribute__((visibility("default")))
#endif

enum { MACHETE_LOADER_VERSION = 3 };  // changes with the structs below; MACHETE_ABI_VERSION is that of GemmParams

enum {
  MACHETE_LOADER_PLAN = 0x4e4c504d,  // machete_loader_plan.magic: "MPLN"
  MACHETE_LOADER_CALL = 0x4c4c434d,  // machete_loader_call.magic: "MCLL"
};

typedef enum machete_loader_status {
  MACHETE_LOADER_OK = 0,
  MACHETE_LOADER_NOT_INITIALISED = -1,  // machete_loader_init has not succeeded yet
  MACHETE_LOADER_NO_DRIVER = -2,        // libcuda cannot be opened
  MACHETE_LOADER_NO_FUNCTION = -3,      // the driver is too old: before CUDA 12.0
  MACHETE_LOADER_BAD_CALL = -4,         // another version, an unknown option, no plan or kernel, or unmapped zeros
  MACHETE_LOADER_BAD_PLAN = -5,         // a plan that no product has
  MACHETE_LOADER_WRONG_ABI = -6,        // a plan for another version of GemmParams
  MACHETE_LOADER_NO_ADDRESS = -7,       // activations, weights, scales, out, mapped zeros or a workspace are null
  MACHETE_LOADER_MISALIGNED = -8,       // an address that the kernels cannot read or write
} machete_loader_status;

// machete_loader_plan.options
enum {
  MACHETE_LOADER_PAIRS = 1,       // set FLAG_STORE_PAIRS where the address of the output is a multiple of 4
  MACHETE_LOADER_ONE_PER_SM = 2,  // no SM is to have two of the CTAs: ask for over half of its shared memory, unless
                                  // the thread's last launch, on the same stream and with the same context in its
                                  // call, leaves the same room on every SM
  MACHETE_LOADER_EVERY_SM = 4,    // with the above: every SM has one
};

// A tensor map of 16-bit elements, without its address. What follows of a third dimension is 0 where rank is 2. rank 0:
// the launch reads no such map, and everything else is 0.
typedef struct machete_loader_map {
  uint32_t rank;
  uint32_t box[3];      // elements of a copy
  uint64_t dims[3];     // elements
  uint64_t strides[2];  // bytes, of the second and third dimension
} machete_loader_map;

// What one shape of a product fixes. machete_aot/launch.py derives these from a schedule (LaunchPlan).
typedef struct machete_loader_plan {
  uint32_t magic;             // MACHETE_LOADER_PLAN
  uint32_t size;              // sizeof(machete_loader_plan)
  uint32_t abi;               // MACHETE_ABI_VERSION
  uint32_t options;           // sum of the above
  uint32_t grid[3];           // in CTAs
  uint32_t block[3];          // in threads
  uint32_t cluster[3];        // in CTAs; 1, 1, 1 launches without the cluster attribute
  uint32_t shared_memory;     // dynamic, in bytes, that the kernel needs
  machete_loader_map acts;    // of rank 2 or 3, in the 128-byte swizzle
  machete_loader_map scales;  // not swizzled; of rank 2 with FLAG_SCALE_MAPS, else 0
  machete_loader_map zeros;   // likewise, and of rank 0 too where there are no zeros; of pairs with FLAG_INTEGER_ZEROS
  uint64_t workspace;         // bytes that a launch needs in global memory
  GemmParams params;          // the pointers and the token are ignored; FLAG_STORE_PAIRS must not be set
} machete_loader_plan;

// machete_loader_call.options
enum {
  MACHETE_LOADER_OVERLAP = 1,  // the kernel may start before earlier ones of the stream end (programmatic launch)
};

// One launch. Addresses are those of the device; null where a product has no such operand.
typedef struct machete_loader_call {
  uint32_t magic;              // MACHETE_LOADER_CALL
  uint32_t size;               // sizeof(machete_loader_call)
  uint32_t options;            // sum of the above
  uint32_t reserved;           // 0
  const void* plan;            // a machete_loader_plan
  void* kernel;                // CUkernel or CUfunction, allowed to use plan.shared_memory bytes and half of an SM's
  void* stream;                // CUstream
  void* context;               // CUcontext to launch in, current or not; null: the current one
  const void* acts;            // on 16 bytes
  const void* weights;         // on 16 bytes
  const void* scales;          // on 16 bytes
  const void* zeros;           // on 16 bytes, or null: with FLAG_SCALE_MAPS just where the plan has no map of them
  const void* bias;            // on 2 bytes, or null
  const void* channel_scales;  // on 4 bytes, or null
  const void* token_scales;    // on 4 bytes, or null
  void* out;                   // on an element
  void* workspace;             // on 16 bytes, plan.workspace bytes that are the launch's own while it runs, or null
} machete_loader_call;

// The versions of the structs above and of GemmParams that the library was compiled with.
MACHETE_LOADER_API uint32_t machete_loader_version(void);
MACHETE_LOADER_API uint32_t machete_loader_abi(void);

// Finds the driver's functions in this library, or in libcuda.so.1 if null. cuInit is the caller's. Again does nothing.
MACHETE_LOADER_API int machete_loader_init(const char* libcuda);

// The number that the next launch takes as its token; each further one takes the next number. Two launches whose
// workspaces may hold each other's leftovers must not have the same one, so begin with 64 random bits.
MACHETE_LOADER_API void machete_loader_seed(uint64_t token);

// Whether a plan of ``size`` bytes is one that machete_loader_launch would take.
MACHETE_LOADER_API int machete_loader_check(const void* plan, size_t size);

// Launches. ``call`` points to a machete_loader_call; neither it nor the plan need be aligned.
MACHETE_LOADER_API int machete_loader_launch(const void* call);

// Of a positive result: the CUresult, and the name of the driver's function. 0 and "" of any other.
MACHETE_LOADER_API int machete_loader_result(int code);
MACHETE_LOADER_API const char* machete_loader_function(int code);

// The name of a status, such as "MACHETE_LOADER_BAD_PLAN"; "a driver call failed" of a positive one.
MACHETE_LOADER_API const char* machete_loader_status_name(int code);

#ifdef __cplusplus
}
#endif
