// Instruction sets: which one the kernels of this process use, and how one source becomes a kernel for each of them.
//
// CMake compiles every kernel source once per instruction set with SHARPCORE_ISA defined as portable, avx2, avx512 or
// avx512bf16: the namespace that all of its code must lie in. Such a source includes no header with inline functions
// outside that namespace (see parallel.h).
#pragma once

#if defined(__x86_64__) || defined(__amd64__)
#define SHARPCORE_X86 1
#else
#define SHARPCORE_X86 0
#endif

namespace sharpcore {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The instruction set in use, chosen at the first call: the best that the CPU has, or what the environment variable
// SHARPCORE_CPU_ISA asks for. Throws std::invalid_argument where that is unknown, std::runtime_error where the CPU
// lacks it.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace sharpcore

// Declares the variants of the kernel `void name(const Arguments&)`.
#if SHARPCORE_X86
#define SHARPCORE_DECLARE_KERNEL(name, Arguments) \
    namespace sharpcore::portable {               \
    void name(const Arguments& arguments);        \
    }                                             \
    namespace sharpcore::avx2 {                   \
    void name(const Arguments& arguments);        \
    }                                             \
    namespace sharpcore::avx512 {                 \
    void name(const Arguments& arguments);        \
    }                                             \
    namespace sharpcore::avx512bf16 {             \
    void name(const Arguments& arguments);        \
    }
#else
#define SHARPCORE_DECLARE_KERNEL(name, Arguments) \
    namespace sharpcore::portable {               \
    void name(const Arguments& arguments);        \
    }
#endif

// Calls the variant of `name` for the active instruction set.
#if SHARPCORE_X86
#define SHARPCORE_CALL_KERNEL(name, arguments)                                                            \
    (::sharpcore::active_isa() == ::sharpcore::Isa::avx512bf16 ? ::sharpcore::avx512bf16::name(arguments) \
     : ::sharpcore::active_isa() == ::sharpcore::Isa::avx512   ? ::sharpcore::avx512::name(arguments)     \
     : ::sharpcore::active_isa() == ::sharpcore::Isa::avx2     ? ::sharpcore::avx2::name(arguments)       \
                                                               : ::sharpcore::portable::name(arguments))
#else
#define SHARPCORE_CALL_KERNEL(name, arguments) (::sharpcore::portable::name(arguments))
#endif
