// Flows of control that hand the processor to one another.
#ifndef STA_TESTS_FIBER_H_
#define STA_TESTS_FIBER_H_

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || defined(STA_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif

namespace sta {
namespace emulator {

#if defined(__x86_64__) && !defined(STA_EMULATE_UCONTEXT)

struct Fiber {
  void* stack_pointer = nullptr;

  // Makes the next switch to this fiber call `entry`, which must never return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    void** slots = reinterpret_cast<void**>(top) - 2;
    slots[0] = reinterpret_cast<void*>(entry);
    slots[1] = nullptr;  // where a call would have left its return address
    stack_pointer = slots;
  }
};

// Inline, and leaving by a jump, so that calls and returns stay paired for the branch predictor:
// all lanes of a warp come from, and go back to, the same places. Every register that a function
// must preserve is named as clobbered; rbp cannot be and is pushed. The 128 bytes below the stack
// pointer may be in use (the ABI's red zone).
inline __attribute__((always_inline)) void switch_fiber(Fiber& from, const Fiber& to) {
  void** save = &from.stack_pointer;
  void* load = to.stack_pointer;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%[save])\n\t"
      "movq %[load], %%rsp\n\t"
      "popq %%rax\n\t"
      "jmpq *%%rax\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp\n\t"
      : [save] "+D"(save), [load] "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
        "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

#else

struct Fiber {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_fiber(Fiber& from, const Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_FIBER_H_
