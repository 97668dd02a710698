// What Switchyard asks of LibTorch and its Rust bindings do not have. Compiled against LibTorch's headers, so
// that another version of them is refused by the compiler; no header of CUDA is needed.

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

// Whether products of float32 matrices on GPUs may round their factors to TF32.
extern "C" void switchyard_set_allow_tf32(bool allow) noexcept {
  try {
    at::globalContext().setAllowTF32CuBLAS(allow);
  } catch (...) {
    // Nothing may be thrown into Rust; whoever asks is told by switchyard_allows_tf32.
  }
}

extern "C" bool switchyard_allows_tf32() noexcept {
  try {
    return at::globalContext().allowTF32CuBLAS();
  } catch (...) {
    return false;
  }
}

// What tensors occupy on a GPU now, the most that they did, and the most that LibTorch held for them, in bytes.
// False where LibTorch does not know that GPU.
extern "C" bool switchyard_device_memory(int device, int64_t* now, int64_t* most, int64_t* most_held) noexcept {
  try {
    const auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *now = stats.allocated_bytes[all].current;
    *most = stats.allocated_bytes[all].peak;
    *most_held = stats.reserved_bytes[all].peak;
    return true;
  } catch (...) {
    return false;
  }
}
