#pragma once

// What lanes.h and the code on top of it use from outside. They are included inside a namespace
// of an instruction set, where nothing else may be included any more.

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/elements.h"
#include "ops/cpu/class_job.h"
