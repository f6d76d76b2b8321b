// What the tables here say, for whoever is not written in C++: rules, their states and options, sizes and limits.
#pragma once

#include <string>

namespace bnbops {

// A JSON object; docs/operators.md has its keys.
std::string facts();

}  // namespace bnbops
