// Unified memory for torch's pluggable allocators (torch.cuda.memory.CUDAPluggableAllocator): the driver moves its
// pages to the host where the GPU's memory runs short, and back when a kernel reads them.
// bnbops/optim/paging/unified.py asks for it.
#include <cuda_runtime_api.h>

// By their names: torch and Python look these functions up in the library.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// Forgets a failed call, which the next launch would be blamed for.
bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess;
}

bool has(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return succeeded(cudaDeviceGetAttribute(&value, attribute, device)) && value != 0;
}

}  // namespace

// What a device does with unified memory: 0 nothing, 1 holds it like its own, 2 pages it.
EXPORTED int bnbops_managed_support(int device) {
  if (!has(cudaDevAttrManagedMemory, device)) return 0;
  return has(cudaDevAttrConcurrentManagedAccess, device) ? 2 : 1;
}

// Memory on the current device, which is `device`: torch has seen to it. Null, for which torch raises
// torch.OutOfMemoryError, if there is none.
EXPORTED void* bnbops_managed_alloc(size_t size, int /*device*/, cudaStream_t /*stream*/) {
  void* memory = nullptr;
  if (size == 0 || !succeeded(cudaMallocManaged(&memory, size, cudaMemAttachGlobal))) return nullptr;
  return memory;
}

// Waits for the kernels that may still use the memory, as cudaFree does. Nobody could handle its errors: the process
// ends, or an earlier kernel has failed.
EXPORTED void bnbops_managed_free(void* memory, size_t /*size*/, int /*device*/, cudaStream_t /*stream*/) {
  succeeded(cudaFree(memory));
}
