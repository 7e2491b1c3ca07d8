// What every file includes, to be compiled once.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "async.h"
#include "half.h"
