// Asks the CPU for its instruction sets and chooses the one the kernels use.
#include "sharpcore/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "sharpcore/cpu_features.h"

#if SHARPCORE_X86
#include <cpuid.h>
#endif

namespace sharpcore {
namespace {

#if SHARPCORE_X86
// The bit of CPUID leaf 7, subleaf 1; that the operating system keeps the registers is avx512's to say.
bool has_avx512_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1);
}
#endif

bool available(Isa isa) {
#if SHARPCORE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (isa) {
        case Isa::avx512bf16:
            return available(Isa::avx512) && has_avx512_bf16();
        case Isa::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return avx2;
        case Isa::portable:
            return true;
    }
#endif
    return isa == Isa::portable;
}

Isa choose() {
    const char* wish = std::getenv("SHARPCORE_CPU_ISA");
    for (Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2, Isa::portable}) {
        if (wish == nullptr || *wish == '\0') {
            if (available(isa)) return isa;
        } else if (std::string(wish) == isa_name(isa)) {
            if (available(isa)) return isa;
            throw std::runtime_error(std::string("SHARPCORE_CPU_ISA: this CPU or build has no ") + wish);
        }
    }
    throw std::invalid_argument(std::string("SHARPCORE_CPU_ISA: expected portable, avx2, avx512 or avx512bf16, got ") +
                                wish);
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512bf16:
            return "avx512bf16";
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::portable:
            break;
    }
    return "portable";
}

Isa active_isa() {
    static const Isa isa = choose();
    return isa;
}

std::vector<std::pair<std::string, bool>> cpu_features() {
    std::vector<std::pair<std::string, bool>> features;
#if SHARPCORE_X86
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool extended = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
    const bool amx_tile = extended && (edx >> 24 & 1);
    const bool amx_bf16 = amx_tile && (edx >> 22 & 1);
    features = {
        {"avx2", __builtin_cpu_supports("avx2") != 0},
        {"fma", __builtin_cpu_supports("fma") != 0},
        {"avx512", available(Isa::avx512)},
        {"avx512_bf16", available(Isa::avx512bf16)},
        {"amx_bf16", amx_bf16},
    };
#endif
    return features;
}

}  // namespace sharpcore
