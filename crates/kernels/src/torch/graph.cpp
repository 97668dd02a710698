// CUDA graphs whose memory LibTorch's allocator keeps for them, which LibTorch has for C++ alone. Every
// function returns 0, or writes why not.
//
// A build needs no CUDA headers: the methods of at::cuda::CUDAGraph are found by their names in the
// LibTorch that runs.

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include <c10/core/CachingDeviceAllocator.h>
#include <dlfcn.h>

namespace {

constexpr size_t ERROR_ROOM = 512;

template <class Work> int guarded(char* error, Work&& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), ERROR_ROOM - 1);
  } catch (...) {
    std::strncpy(error, "an exception of another kind", ERROR_ROOM - 1);
  }
  error[ERROR_ROOM - 1] = 0;
  return 1;
}

template <class Function> Function method(const char* mangled) {
  void* found = dlsym(RTLD_DEFAULT, mangled);
  TORCH_CHECK(found, "this LibTorch has no ", mangled);
  return reinterpret_cast<Function>(found);
}

// Memory for an at::cuda::CUDAGraph; more than any LibTorch so far needs.
struct alignas(64) Graph {
  unsigned char bytes[2048];
};

using Method = void (*)(Graph*);
// cudaStreamCaptureModeThreadLocal: other threads may do to other streams what they like, but for the default
// stream, for which the recorded one waits: nobody may use that meanwhile.
constexpr int OTHER_THREADS_ARE_FREE = 1;

c10::DeviceAllocator* allocator() { return c10::getDeviceAllocator(c10::DeviceType::CUDA); }

} // namespace

extern "C" {

// Returns what the allocator keeps without use to the GPU.
int switchyard_torch_empty_cache(char* error) {
  return guarded(error, [] { allocator()->emptyCache(); });
}

int switchyard_torch_graph_new(void** graph, char* error) {
  return guarded(error, [&] {
    auto construct = method<void (*)(Graph*, bool)>("_ZN2at4cuda9CUDAGraphC1Eb");
    Graph* made = new Graph();
    try {
      construct(made, false);
    } catch (...) {
      delete made;
      throw;
    }
    *graph = made;
  });
}

int switchyard_torch_graph_begin(void* graph, char* error) {
  return guarded(error, [&] {
    using Pool = std::pair<unsigned long long, unsigned long long>;
    auto begin = method<void (*)(Graph*, Pool, int)>(
        "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    begin(static_cast<Graph*>(graph), Pool(0, 0), OTHER_THREADS_ARE_FREE);
  });
}

int switchyard_torch_graph_end(void* graph, char* error) {
  return guarded(error, [&] {
    method<Method>("_ZN2at4cuda9CUDAGraph11capture_endEv")(static_cast<Graph*>(graph));
  });
}

int switchyard_torch_graph_replay(void* graph, char* error) {
  return guarded(error, [&] {
    method<Method>("_ZN2at4cuda9CUDAGraph6replayEv")(static_cast<Graph*>(graph));
  });
}

int switchyard_torch_graph_delete(void* graph, char* error) {
  return guarded(error, [&] {
    Graph* made = static_cast<Graph*>(graph);
    method<Method>("_ZN2at4cuda9CUDAGraphD1Ev")(made);
    delete made;
  });
}
}
