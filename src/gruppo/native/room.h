// Memory that threads compute in. It is had before they start: what is thrown among them, by an
// allocation say, ends the process.

#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <new>

// After the body of a function that Python calls, which begins with `try {`.
#define OR_NO_MEMORY              \
  catch (const std::exception&) { \
    return -1;                    \
  }

namespace {

// What the threads compute in, one beside the other.
template <typename N>
class Room {
  std::unique_ptr<N[]> numbers_;
  int64_t size_;

 public:
  explicit Room(int64_t size) : numbers_(new N[size * omp_get_max_threads()]), size_(size) {}
  N* own() const { return numbers_.get() + size_ * omp_get_thread_num(); }
};

}  // namespace
