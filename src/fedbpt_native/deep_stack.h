#pragma once

#include <cstddef>
#include <functional>

namespace fedbpt {

// Runs `call` on a thread with a stack of so many bytes and waits for it. Throws what it throws; std::bad_alloc where the stack is more
// than this process may have.
void run_with_stack(size_t bytes, const std::function<void()> & call);

}  // namespace fedbpt
