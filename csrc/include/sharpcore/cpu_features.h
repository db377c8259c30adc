// What the CPU can do, for reports.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sharpcore {

// Names of instruction-set extensions and whether this CPU and its operating system offer them; empty where unknown.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace sharpcore
