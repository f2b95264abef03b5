// Whether this process may use AMX's tiles with bfloat16.
#ifndef STA_CPU_AMX_PERMISSION_H_
#define STA_CPU_AMX_PERMISSION_H_

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sta {

// The processor has AMX and the kernel grants its large register state. Asks once a process:
// threads share the permission and forks inherit it. An old kernel or a sandbox may refuse.
inline bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool permitted = [] {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of CPUID 7, EDX
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}

}  // namespace sta

#endif  // STA_CPU_AMX_PERMISSION_H_
