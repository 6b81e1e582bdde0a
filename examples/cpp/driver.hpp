// SPDX-License-Identifier: Apache-2.0
// The functions of the CUDA driver that the example needs, from libcuda.so.1. cuda.h is not needed.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

template <typename... Arguments>
class DriverFunction {
 public:
  DriverFunction(void* library, const char* name)
      : name_(name), function_(reinterpret_cast<int (*)(Arguments...)>(dlsym(library, name))) {
    if (!function_) throw std::runtime_error("the driver has no " + name_ + "; 525 or newer is needed");
  }
  void operator()(Arguments... arguments) const {
    const int result = function_(arguments...);
    if (result) throw std::runtime_error(name_ + " failed with CUresult " + std::to_string(result));
  }

 private:
  std::string name_;
  int (*function_)(Arguments...);
};

struct Driver {
  void* library = open();
  DriverFunction<unsigned> init{library, "cuInit"};
  DriverFunction<int*, int> device{library, "cuDeviceGet"};
  DriverFunction<int*, int, int> attribute{library, "cuDeviceGetAttribute"};
  DriverFunction<void**, int> context{library, "cuDevicePrimaryCtxRetain"};
  DriverFunction<void*> push{library, "cuCtxPushCurrent_v2"};
  DriverFunction<> synchronize{library, "cuCtxSynchronize"};
  DriverFunction<void**, const void*, void*, void*, unsigned, void*, void*, unsigned> load{library,
                                                                                           "cuLibraryLoadData"};
  DriverFunction<void**, void*, const char*> kernel{library, "cuLibraryGetKernel"};
  DriverFunction<void**, void*> function{library, "cuKernelGetFunction"};
  DriverFunction<int, int, void*, int> set{library, "cuKernelSetAttribute"};
  DriverFunction<void**, std::size_t> allocate{library, "cuMemAlloc_v2"};
  DriverFunction<void*, const void*, std::size_t> upload{library, "cuMemcpyHtoD_v2"};
  DriverFunction<void*, const void*, std::size_t> download{library, "cuMemcpyDtoH_v2"};

 private:
  static void* open() {
    void* found = dlopen("libcuda.so.1", RTLD_NOW);
    if (!found) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    return found;
  }
};
