// Working memory of a call. Each thread keeps what its largest calls needed (up to a bound) and hands it out again, so that a kernel of a tenth of a
// millisecond does not spend a third of it on page faults. Kernels keep no state in it between calls.
#pragma once

#include <cstdint>

namespace vitkernels {

// Memory aligned to 64 bytes, uninitialised. Released in the reverse order of acquisition, on the same thread.
void* acquire_scratch(int64_t bytes);
void release_scratch(void* memory, int64_t bytes);

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_(count * static_cast<int64_t>(sizeof(T))), data_(static_cast<T*>(acquire_scratch(bytes_))) {}
  ~Buffer() { release_scratch(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }

 private:
  const int64_t bytes_;
  T* const data_;
};

}  // namespace vitkernels
