// Which kernels this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace llmb {

// Best first; always ends with "generic".
std::vector<std::string> available_isas();

// Throws std::invalid_argument when the processor lacks it or there is no such name.
const Kernels& kernels_for(const std::string& isa);

}  // namespace llmb
